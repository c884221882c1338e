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
use tidegate::provider::{Append, ClaimRequest, Provider, Retention, Want};
use tidegate::subscription::Ordering;
use tokio::sync::mpsc;

use crate::nats_server::NatsServer;
use crate::rig::{Rig, compare_latency, event, idle};
use crate::support;

const BATCH: usize = 500;
const EVENTS: usize = 20_000;
const PACED: usize = 150;
const KEPT: usize = 20_000;

pub(crate) fn run() {
    if std::process::Command::new("nats-server").arg("--version").output().is_err() {
        println!("nats-server is not installed: rows against it are left out");
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
    runtime.block_on(sizes());
}

/// JetStream without the streams of the round before.
async fn emptied(server: &NatsServer) -> Context {
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
        let batch = consumer.fetch().max_messages(BATCH).messages().await.unwrap();
        let messages: Vec<Message> = batch.map(Result::unwrap).collect().await;
        assert_eq!(messages.len(), BATCH);
        complete_by_hand(&context, &messages).await;
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

/// What the process keeps in memory and the server on disk: per event that is open, that is finished, and after retention ran;
/// and how long a process takes to begin with that many.
async fn sizes() {
    let server = NatsServer::start(&[]);
    let provider = provider(&server).await;
    let names: Arc<[Arc<str>]> = [Arc::from("all")].into();
    let append = || Append { event: Arc::new(event()), subscriptions: Arc::clone(&names) };
    let measure = async || {
        let stored = provider.stats().await.unwrap().provider_specific["bytes"].as_f64().unwrap();
        (support::resident(std::process::id()) * 1_048_576.0, stored)
    };
    let empty = measure().await;
    for round in 0..3 {
        for _ in 0..KEPT / BATCH {
            provider.append((0..BATCH).map(|_| append()).collect()).await.unwrap();
        }
        let open = measure().await;
        let want = Want { subscription: "all".into(), room: KEPT, ordering: Ordering::None };
        let request = ClaimRequest { worker: "w".into(), lease: Duration::from_secs(600), wants: vec![want] };
        let leases = provider.claim(&request).await.unwrap().leases;
        assert_eq!(leases.len(), KEPT);
        let mut leases = leases.into_iter();
        for _ in 0..KEPT / BATCH {
            provider.settle(leases.by_ref().take(BATCH).map(support::success).collect()).await.unwrap();
        }
        let finished = measure().await;
        let began = Instant::now();
        let late = NatsProvider::open(Options { url: server.url(), ..Options::default() }).await.unwrap();
        let took = began.elapsed();
        late.close().await.unwrap();
        drop(late);
        provider.prune(&Retention { max_age: None, max_events: Some(0) }).await.unwrap();
        let pruned = measure().await;
        let per = |(resident, stored): (f64, f64)| {
            format!("{:.0} and {:.0}", (resident - empty.0) / KEPT as f64, (stored - empty.1) / KEPT as f64)
        };
        println!(
            "NATS, round {round}: bytes of memory and of the stream: {} per open delivery, {} per finished event, {} after retention (payload {} bytes); a process begins with them in {took:?}",
            per(open),
            per(finished),
            per(pruned),
            support::payload().len()
        );
    }
}
