//! tidegate inside an application: events in memory, a native handler, and a publisher that waits for the answer.
//!
//! No HTTP, no plugins and no files. Run it with `cargo run --example embed`.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tidegate::broker::{Broker, Options};
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::{Call, Event, Failure, Metrics, Payload, Reply, Source, Subscription, native};
use tokio::sync::oneshot;

/// Called once per event, and again after a [`Failure::retry`]. A [`Failure::reject`] makes a dead letter at once.
async fn greet(call: Call) -> Result<Reply, Failure> {
    let user: Value = call.event.payload.parse()?;
    let name =
        user.get("name").and_then(Value::as_str).ok_or_else(|| Failure::reject("no-name", "a user needs a name"))?;
    Ok(Reply::json(&json!({"greeting": format!("hello {name}")}))?)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let provider = Arc::new(MemoryProvider::open(memory::Options::default())?);
    let options = Options { instance_id: "embed".to_owned(), ..Options::default() };
    let (broker, service) = Broker::open(provider, options, Metrics::default()).await?;
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(service.run(async { drop(stopped.await) }));

    broker.subscribe(Subscription::new("greeter", "public.users.*".parse()?), native(greet)).await?;

    for user in [json!({"name": "Ada"}), json!({"email": "nobody@example.org"})] {
        let event = Event::new(Source::Internal, "public.users.create".parse()?, Payload::json(&user)?);
        let answer = broker.publish_sync(event, Duration::from_secs(5)).await?;
        let record = &answer.detail.record;
        println!("event {} is {}", record.event.seq.unwrap_or_default(), record.status);
        for attempt in answer.detail.deliveries.iter().flat_map(|delivery| &delivery.attempts) {
            let reply = attempt.reply.as_ref().map(|reply| String::from_utf8_lossy(&reply.body).into_owned());
            let fault = attempt.error.as_ref().map(ToString::to_string);
            println!("  attempt {}: {}, {}", attempt.number, attempt.verdict, reply.or(fault).unwrap_or_default());
        }
    }

    drop(stop);
    running.await??;
    Ok(())
}
