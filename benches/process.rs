//! What this program does as a process of its own, beside the one that measures: a broker that publishes at a pace, one that
//! handles what another publishes, one of several that share a store, and one whose memory is measured. Called as [`peer`](crate::peer) calls any.

use std::io::BufRead as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tidegate::provider::Provider;
use tidegate::provider::nats::{self, NatsProvider};
use tidegate::provider::postgres::{self, PostgresProvider};
use tidegate::provider::redis::{self, RedisProvider};
use tidegate::{Event, Payload, Source, Subscription, native};
use tokio::sync::mpsc;

use crate::rig::{Rig, idle};
use crate::support;
use crate::{keep, replicas};

/// The first argument of this program where it is such a process.
pub(crate) const WORD: &str = "process";

/// Does what the words say: what, on which store, how often.
pub(crate) fn run(words: &[String]) {
    let [what, url, count] = words else { panic!("what, a URL and a count, not {words:?}") };
    let count = count.parse().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        if what == "keep" {
            return keep::run(url, count).await;
        }
        let rig = Rig::over(open(url).await).await;
        match what.as_str() {
            "pace" => pace(rig, count).await,
            "work" => work(rig, count).await,
            "share" => share(rig).await,
            other => panic!("pace, work, share or keep, not {other}"),
        }
    });
}

pub(crate) async fn open(url: &str) -> Arc<dyn Provider> {
    let url = url.to_owned();
    if url.starts_with("nats") {
        return Arc::new(NatsProvider::open(nats::Options { url, ..nats::Options::default() }).await.unwrap());
    }
    if url.starts_with("redis") {
        return Arc::new(RedisProvider::open(redis::Options { url, ..redis::Options::default() }).await.unwrap());
    }
    Arc::new(PostgresProvider::open(postgres::Options { url, ..postgres::Options::default() }).await.unwrap())
}

/// Milliseconds of the clock that all processes of a machine share.
fn millis() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() * 1e3
}

/// Publishes 50 events a second, each with the time at which it was sent, whether or not the last is acknowledged.
async fn pace(mut rig: Rig, count: usize) {
    let running = rig.run();
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let mut publishes = Vec::new();
    for _ in 0..count {
        ticks.tick().await;
        let payload = Payload::json(&serde_json::json!({"sent": millis(), "order": support::payload()})).unwrap();
        let event = Event::new(Source::Internal, "shop.orders.create".parse().unwrap(), payload);
        let broker = rig.broker.clone();
        publishes.push(tokio::spawn(async move { broker.publish(event).await.unwrap() }));
    }
    for publish in publishes {
        publish.await.unwrap();
    }
    rig.end(running).await;
}

/// Handles so many events of [`pace`], and prints how many milliseconds each was on its way.
async fn work(mut rig: Rig, count: usize) {
    let (send, mut receive) = mpsc::unbounded_channel();
    let handler = native(move |call: tidegate::Call| {
        let order: serde_json::Value = call.event.payload.parse().unwrap();
        send.send(millis() - order["sent"].as_f64().unwrap()).ok();
        async { Ok(()) }
    });
    rig.broker.subscribe(Subscription::new("all", "shop.orders.*".parse().unwrap()), handler).await.unwrap();
    let running = rig.run();
    println!("ready");
    for _ in 0..count {
        println!("{}", receive.recv().await.unwrap());
    }
    rig.end(running).await;
}

/// Handles what there is for all subscriptions of [`replicas`], once a line of input says so, and prints again and again how
/// many attempts of each are settled; until its input ends.
async fn share(mut rig: Rig) {
    println!("ready");
    // Whoever keeps the lock would keep the task below from seeing the end.
    std::io::stdin().read_line(&mut String::new()).unwrap();
    for name in replicas::SUBSCRIPTIONS {
        rig.broker.subscribe(Subscription::new(name, "shop.orders.*".parse().unwrap()), idle()).await.unwrap();
    }
    let running = rig.run();
    let ended = tokio::task::spawn_blocking(|| std::io::stdin().lock().lines().count());
    // Seldom: telling takes time that the work would have.
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    while !ended.is_finished() {
        ticks.tick().await;
        let counts = rig.settled_of(replicas::SUBSCRIPTIONS).map(|count| count.to_string());
        println!("{}", counts.join(" "));
    }
    rig.end(running).await;
}
