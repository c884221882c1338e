//! Claims about documents.

use std::sync::Arc;
use std::time::Duration;

use super::scene::Scene;
use crate::error::Error;
use crate::provider::Expect;

async fn put(scene: &Scene, key: &str, value: &str, expect: Expect) -> Result<u64, Error> {
    scene.provider.put_document("c", key, value.to_owned().into(), expect, None).await
}

fn is_conflict<T: std::fmt::Debug>(answer: &Result<T, Error>) -> bool {
    matches!(answer, Err(Error::Conflict { .. }))
}

/// Compare-and-swap.
pub async fn a_document_changes_only_as_expected(scene: Scene) {
    let provider = &scene.provider;
    assert_eq!(provider.document("c", "k").await.unwrap(), None);
    assert!(is_conflict(&put(&scene, "k", "v", Expect::Revision(1)).await));
    let first = put(&scene, "k", "one", Expect::Absent).await.unwrap();
    assert!(is_conflict(&put(&scene, "k", "v", Expect::Absent).await));
    assert!(is_conflict(&put(&scene, "k", "v", Expect::Revision(first + 1)).await));
    let second = put(&scene, "k", "two", Expect::Revision(first)).await.unwrap();
    assert!(second > first);
    assert!(is_conflict(&provider.delete_document("c", "k", Expect::Revision(first)).await));
    let document = provider.document("c", "k").await.unwrap().unwrap();
    assert_eq!((&*document.value, document.revision), (&b"two"[..], second));
    assert!(put(&scene, "k", "three", Expect::Any).await.unwrap() > second);
    assert!(is_conflict(&provider.delete_document("c", "k", Expect::Absent).await));
    assert!(provider.delete_document("c", "k", Expect::Any).await.unwrap());
    assert!(!provider.delete_document("c", "k", Expect::Any).await.unwrap());
    assert!(!provider.delete_document("c", "k", Expect::Absent).await.unwrap());
    assert!(is_conflict(&provider.delete_document("c", "k", Expect::Revision(1)).await));
    assert_eq!(provider.document("other", "k").await.unwrap(), None);
    let long = "é".repeat(257);
    assert!(matches!(put(&scene, &long, "v", Expect::Any).await, Err(Error::Invalid { .. })));
}

/// Eight writers, each adding to what it read.
pub async fn one_of_many_writers_wins_each_revision(scene: Scene) {
    put(&scene, "n", "0", Expect::Absent).await.unwrap();
    let scene = Arc::new(scene);
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let scene = Arc::clone(&scene);
            tokio::spawn(async move {
                let mut left = 10;
                while left > 0 {
                    let read = scene.provider.document("c", "n").await.unwrap().unwrap();
                    let number: u64 = std::str::from_utf8(&read.value).unwrap().parse().unwrap();
                    match put(&scene, "n", &(number + 1).to_string(), Expect::Revision(read.revision)).await {
                        Ok(_) => left -= 1,
                        Err(error) => assert!(matches!(error, Error::Conflict { .. }), "{error}"),
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(scene.text("c", "n").await.as_deref(), Some("80"));
}

/// Expiry follows the store's clock.
pub async fn a_document_with_a_ttl_expires(scene: Scene) {
    let ttl = Duration::from_secs(5);
    let provider = &scene.provider;
    let first = provider.put_document("c", "k", "v".into(), Expect::Absent, Some(ttl)).await.unwrap();
    put(&scene, "stays", "v", Expect::Any).await.unwrap();
    scene.advance(ttl - Duration::from_micros(1)).await;
    assert!(provider.document("c", "k").await.unwrap().is_some());
    scene.advance(Duration::from_micros(1)).await;
    assert_eq!(provider.document("c", "k").await.unwrap(), None);
    assert_eq!(provider.list_documents("c", None, 9).await.unwrap().len(), 1);
    assert!(is_conflict(&put(&scene, "k", "v", Expect::Revision(first)).await));
    assert!(!provider.delete_document("c", "k", Expect::Any).await.unwrap());
    put(&scene, "k", "again", Expect::Absent).await.unwrap();
    scene.advance(ttl * 2).await;
    assert_eq!(scene.text("c", "k").await.as_deref(), Some("again"), "a value stored without one has no expiry");
}

/// Keys list in byte order.
pub async fn documents_are_listed_in_byte_order_and_in_pages(scene: Scene) {
    let mut keys = ["b", "a/2", "a", "B", "a/10", "é", "", "z", "a%", "a_b", "🦀"];
    for key in keys {
        put(&scene, key, key, Expect::Absent).await.unwrap();
    }
    scene.provider.put_document("c2", "elsewhere", "v".into(), Expect::Any, None).await.unwrap();
    keys.sort_unstable();
    for size in [1, 4, 50] {
        let (mut listed, mut after) = (Vec::new(), None::<String>);
        loop {
            let page = scene.provider.list_documents("c", after.as_deref(), size).await.unwrap();
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            listed.extend(page.into_iter().map(|(key, document)| {
                assert_eq!(key.as_bytes(), &*document.value);
                key
            }));
        }
        assert_eq!(listed, keys, "pages of {size}");
    }
}

/// Values are bytes, names are any text.
pub async fn documents_hold_any_bytes_under_any_name(scene: Scene) {
    let every: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    for (at, name) in super::publishing::hostile_texts().into_iter().enumerate() {
        let name: String = name.chars().take(200).collect();
        let value = bytes::Bytes::from(every[..at * 1_000].to_vec());
        scene.provider.put_document(&name, &name, value.clone(), Expect::Absent, None).await.unwrap();
        assert_eq!(scene.provider.document(&name, &name).await.unwrap().unwrap().value, value);
        assert_eq!(scene.provider.list_documents(&name, None, 9).await.unwrap().len(), 1);
    }
}

/// A document that is removed and made again is another one.
pub async fn a_revision_is_never_given_out_twice(scene: Scene) {
    let first = put(&scene, "k", "v", Expect::Any).await.unwrap();
    scene.provider.delete_document("c", "k", Expect::Any).await.unwrap();
    let second = put(&scene, "k", "v", Expect::Any).await.unwrap();
    assert!(second > first);
    assert!(is_conflict(&put(&scene, "k", "w", Expect::Revision(first)).await));
}
