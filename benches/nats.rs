//! The broker and its NATS provider against the same work by hand, on the same private server.
//!
//! `cargo bench -- nats`; needs `nats-server`. By hand means the shortest honest code over the same store: a stream with one
//! durable consumer, 500 messages published and acknowledged at once, 500 fetched at once, and for each event a status put
//! into a KV bucket before its message is acknowledged; no broker, no matching, no retries, no leases, no attempts kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{PullConsumer, pull};
use async_nats::jetstream::context::PublishAckFuture;
use async_nats::jetstream::{Context, Message, stream};
use futures_util::StreamExt as _;
use tidegate::provider::nats::{NatsProvider, Options};
use tokio::sync::mpsc;

use crate::nats_server::NatsServer;
use crate::rig::{Rig, compare_latency, idle};
use crate::support;

const BATCH: usize = 500;
const EVENTS: usize = 20_000;
const PACED: usize = 150;

pub(crate) fn run() {
    if !support::is_installed("nats-server") {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = NatsServer::start(&[]);
    support::compare(
        "NATS file, publish → claim → settle in batches, native handler",
        "≥ 0.3 of by hand",
        || runtime.block_on(async { rig(&server).await.batches(EVENTS, BATCH, idle()).await }),
        || runtime.block_on(batches_by_hand(&server)),
    );
    compare_latency(
        "NATS file",
        ["none", "none"],
        || runtime.block_on(async { rig(&server).await.pick_up(PACED).await }),
        || runtime.block_on(pick_up_by_hand(&server)),
    );
}

/// JetStream without the streams of the round before.
pub(crate) async fn emptied(server: &NatsServer) -> Context {
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let mut names = context.stream_names();
    while let Some(name) = names.next().await {
        context.delete_stream(name.unwrap()).await.unwrap();
    }
    context
}

async fn provider(server: &NatsServer) -> Arc<NatsProvider> {
    emptied(server).await;
    Arc::new(NatsProvider::open(Options { url: server.url(), ..Options::default() }).await.unwrap())
}

async fn rig(server: &NatsServer) -> Rig {
    Rig::over(provider(server).await).await
}

/// A stream with a consumer, and a second one whose newest message per subject is an event's status: what a KV bucket is.
async fn by_hand(server: &NatsServer) -> (Context, PullConsumer) {
    let context = emptied(server).await;
    let config = |name: &str, newest_only: bool| stream::Config {
        name: name.to_owned(),
        subjects: vec![format!("{name}.>")],
        max_messages_per_subject: if newest_only { 1 } else { -1 },
        ..stream::Config::default()
    };
    context.create_stream(config("status", true)).await.unwrap();
    let events = context.create_stream(config("events", false)).await.unwrap();
    let config =
        pull::Config { durable_name: Some("c".to_owned()), max_ack_pending: 100_000, ..pull::Config::default() };
    (context, events.create_consumer(config).await.unwrap())
}

async fn acknowledged(acks: Vec<PublishAckFuture>) {
    for ack in acks {
        ack.await.unwrap();
    }
}

async fn publish_by_hand(context: &Context, count: usize, payload: &str) {
    let mut acks = Vec::with_capacity(count);
    for _ in 0..count {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Event-ID", uuid::Uuid::now_v7().to_string());
        let payload = payload.to_owned().into();
        acks.push(context.publish_with_headers("events.shop.orders.create", headers, payload).await.unwrap());
    }
    acknowledged(acks).await;
}

async fn complete_by_hand(context: &Context, messages: &[Message]) {
    let mut acks = Vec::with_capacity(messages.len());
    for message in messages {
        let place = message.info().unwrap().stream_sequence;
        acks.push(context.publish(format!("status.{place}"), "2".into()).await.unwrap());
    }
    acknowledged(acks).await;
    for message in messages {
        message.ack().await.unwrap();
    }
}

async fn batches_by_hand(server: &NatsServer) -> f64 {
    let (context, consumer) = by_hand(server).await;
    let payload = support::payload();
    let began = Instant::now();
    for _ in 0..EVENTS / BATCH {
        publish_by_hand(&context, BATCH, &payload).await;
        let mut left = BATCH;
        while left > 0 {
            // What is not there at once is not waited for, and a consumer learns of a message after its acknowledgement.
            let batch = consumer.fetch().max_messages(left).messages().await.unwrap();
            let messages: Vec<Message> = batch.map(Result::unwrap).collect().await;
            complete_by_hand(&context, &messages).await;
            left -= messages.len();
        }
    }
    support::per_second(EVENTS, began)
}

async fn pick_up_by_hand(server: &NatsServer) -> Vec<Duration> {
    let (context, consumer) = by_hand(server).await;
    let (started, mut starts) = mpsc::unbounded_channel();
    let worker_context = context.clone();
    let worker = tokio::spawn(async move {
        let mut messages = consumer.messages().await.unwrap().take(PACED);
        while let Some(message) = messages.next().await {
            started.send(Instant::now()).unwrap();
            complete_by_hand(&worker_context, &[message.unwrap()]).await;
        }
    });
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let mut times = Vec::new();
    for _ in 0..PACED {
        ticks.tick().await;
        let began = Instant::now();
        publish_by_hand(&context, 1, "1").await;
        times.push(starts.recv().await.unwrap().duration_since(began));
    }
    worker.await.unwrap();
    times
}
