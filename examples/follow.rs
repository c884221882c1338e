//! Follows the events of a broker in one's own process: from the first, then live, and again from where it was.
//!
//! Run it with `cargo run --example follow`.

use std::sync::Arc;

use tidegate::broker::Options;
use tidegate::feed::{Filter, Frame, Position, Request, Subscriber};
use tidegate::provider::Provider;
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::{Broker, Event, Feed, Metrics, Payload, Source};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let provider: Arc<dyn Provider> = Arc::new(MemoryProvider::open(memory::Options::default())?);
    let options = Options { instance_id: "follow".to_owned(), ..Options::default() };
    let (broker, service) = Broker::open(Arc::clone(&provider), options, Metrics::default()).await?;
    let (feed, tail) = Feed::new(provider, Metrics::default());
    tokio::spawn(service.run(std::future::pending()));
    tokio::spawn(tail.run(std::future::pending()));

    publish(&broker, 3).await?;
    let filter = Filter { patterns: vec!["shop.orders.*".parse()?], ..Filter::default() };
    let from = |position| Request { filter: filter.clone(), position, epoch: None };
    let mut client = feed.subscribe(from(Position::Beginning)).await?;
    show(&mut client, 3).await;
    publish(&broker, 2).await?;
    show(&mut client, 2).await;

    // A client that comes back says where it was, and misses nothing.
    let place = client.cursor();
    drop(client);
    publish(&broker, 2).await?;
    show(&mut feed.subscribe(from(Position::After(place))).await?, 2).await;
    Ok(())
}

async fn publish(broker: &Broker, count: u32) -> tidegate::Result<()> {
    for total in 0..count {
        let payload = Payload::json(&serde_json::json!({"total": total}))?;
        broker.publish(Event::new(Source::Internal, "shop.orders.create".parse()?, payload)).await?;
    }
    Ok(())
}

/// Shows the next `count` frames.
async fn show(client: &mut Subscriber, mut count: usize) {
    while count > 0
        && let Some(frames) = client.next().await
    {
        count = count.saturating_sub(frames.len());
        for frame in frames {
            match frame {
                Frame::Event(entry) => println!("{}", String::from_utf8_lossy(entry.json())),
                Frame::Reset { from_seq } => println!("missed something; going on from {from_seq}"),
            }
        }
    }
}
