//! Random walks: whatever is done in whatever order, the figures add up, and memory would have done the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::scene::{LEASE, Scene, appends, ended, event, event_with_id, request, retry, success_with, write};
use crate::delivery::{Delivery, EventDetail, KvChange, Next, Status, Verdict};
use crate::event::Event;
use crate::pattern::Pattern;
use crate::provider::memory::{MemoryProvider, Options};
use crate::provider::{
    Amendment, DeadLetterFilter, EventFilter, Lease, Provider, ProviderStats, Replay, Retention, Settlement,
};
use crate::subscription::Ordering;

const SUBSCRIPTIONS: [&str; 3] = ["plain", "ordered", "other"];

/// Something done to a store. Leases are named by their place among those that were given out.
#[derive(Debug, Clone)]
enum Step {
    Append(Vec<Event>, Vec<&'static str>),
    Claim(&'static str, usize),
    Settle(Vec<(usize, Next)>),
    Renew(usize),
    Advance(Duration),
    Redrive(DeadLetterFilter),
    Replay(Replay),
    Cancel(&'static str),
    Erase(String),
    Prune(Retention),
}

struct Walker {
    rng: StdRng,
    events: usize,
    leases: usize,
}

impl Walker {
    fn one_of(&mut self) -> &'static str {
        SUBSCRIPTIONS[self.rng.random_range(0..3)]
    }

    fn event(&mut self) -> Event {
        let number = if self.rng.random_ratio(1, 10) { self.rng.random_range(0..=self.events) } else { self.events };
        self.events += 1;
        let types = ["shop.orders.create", "shop.orders.update", "chat.message"];
        let mut event =
            Event { event_type: types[number % 3].parse().unwrap(), ..event_with_id(&format!("e{number}")) };
        event.key = [None, Some("k1".into()), Some("k2".into())][number / 3 % 3].clone();
        event
    }

    fn next(&mut self) -> Next {
        match self.rng.random_range(0..8) {
            0..4 => Next::Complete,
            4..6 => retry(self.rng.random_range(0..3) * 400),
            6 => Next::Fail,
            _ => Next::Release,
        }
    }

    fn settle(&mut self) -> Step {
        let count = self.rng.random_range(1..6);
        let recent = self.leases.saturating_sub(12);
        let any = self.leases.max(1);
        Step::Settle((0..count).map(|_| (self.rng.random_range(recent..any.max(recent + 1)), self.next())).collect())
    }

    fn step(&mut self) -> Step {
        match self.rng.random_range(0..40) {
            0..10 => {
                let events = (0..self.rng.random_range(1..4)).map(|_| self.event()).collect();
                let chosen = SUBSCRIPTIONS.into_iter().filter(|_| self.rng.random_ratio(2, 3)).collect();
                Step::Append(events, chosen)
            }
            10..20 => Step::Claim(self.one_of(), self.rng.random_range(1..5)),
            20..31 => self.settle(),
            31 => Step::Renew(self.rng.random_range(0..self.leases.max(1))),
            32..35 => Step::Advance(Duration::from_millis(self.rng.random_range(1..900))),
            35 => Step::Advance(LEASE + Duration::from_millis(1)),
            36 => {
                let subscription = self.rng.random_bool(0.5).then(|| self.one_of().to_owned());
                let verdict = self.rng.random_bool(0.3).then_some(Verdict::Lost);
                let limit = self.rng.random_range(0..4);
                Step::Redrive(DeadLetterFilter { subscription, verdict, limit, ..DeadLetterFilter::default() })
            }
            37 => Step::Replay(Replay {
                subscription: self.one_of().into(),
                pattern: Pattern::parse("shop.*.create").unwrap(),
                from_seq: Some(self.rng.random_range(0..=self.events as u64)),
                to_seq: None,
                from: None,
                to: None,
                missing_only: self.rng.random_bool(0.5),
                dry_run: self.rng.random_bool(0.3),
            }),
            38 if self.rng.random_bool(0.3) => Step::Cancel(self.one_of()),
            38 => Step::Erase(format!("e{}", self.rng.random_range(0..=self.events))),
            _ => Step::Prune(Retention { max_age: None, max_events: Some(self.rng.random_range(10..60)) }),
        }
    }
}

fn settlement(lease: &Lease, next: Next) -> Settlement {
    let mut settlement = ended(lease, next);
    if next == Next::Complete && lease.key.seq.is_multiple_of(4) {
        settlement = success_with(lease, vec![write("n", KvChange::Increment { by: 1 })]);
        let mut child = event_with_id(&format!("child-{}", lease.event.id));
        child.created_at = lease.event.created_at;
        settlement.published = appends(vec![child], &["other"]);
    }
    // The record's times come from outside: the same on both sides of a comparison.
    settlement.attempt.iter_mut().for_each(|attempt| attempt.started_at = crate::event::micros(0));
    settlement
}

/// Does a step, and tells what came of it in a form that two stores can be compared by.
async fn take(provider: &dyn Provider, leases: &mut Vec<Lease>, step: Step) -> String {
    match step {
        Step::Append(events, subscriptions) => {
            format!("{:?}", provider.append(appends(events, &subscriptions)).await.unwrap())
        }
        Step::Claim(subscription, room) => {
            let ordering = if subscription == "ordered" { Ordering::Key } else { Ordering::None };
            let claimed = provider.claim(&request(&[(subscription, room)], ordering)).await.unwrap().leases;
            let told = claimed.iter().map(|lease| {
                (lease.key.seq, lease.attempt, lease.number, lease.infra_faults, lease.is_replay, lease.event.clone())
            });
            let told = format!("{:?}", told.collect::<Vec<_>>());
            leases.extend(claimed);
            told
        }
        Step::Settle(ends) => {
            let batch = ends.into_iter().filter_map(|(at, next)| Some(settlement(leases.get(at)?, next))).collect();
            format!("{:?}", provider.settle(batch).await.unwrap())
        }
        Step::Renew(at) => match leases.get(at) {
            Some(lease) => format!("{:?}", provider.renew(std::slice::from_ref(&lease.key), LEASE).await.unwrap()),
            None => String::new(),
        },
        Step::Advance(_) => String::new(),
        Step::Redrive(filter) => provider.amend(Amendment::Redrive(filter)).await.unwrap().to_string(),
        Step::Replay(replay) => provider.amend(Amendment::Replay(replay)).await.unwrap().to_string(),
        Step::Cancel(subscription) => {
            provider.amend(Amendment::Cancel { subscription: subscription.into() }).await.unwrap().to_string()
        }
        Step::Erase(id) => provider.amend(Amendment::Erase { id }).await.unwrap().to_string(),
        Step::Prune(retention) => provider.prune(&retention).await.unwrap().to_string(),
    }
}

/// All that the store knows of its events, without the times.
async fn contents(provider: &dyn Provider) -> Vec<String> {
    let mut told = Vec::new();
    for record in provider.list(&EventFilter::default()).await.unwrap().records {
        let detail = provider.get(record.event.id.as_str()).await.unwrap().unwrap();
        assert_eq!(detail.record, record);
        let EventDetail { record, deliveries } = detail;
        told.push(format!("{:?} {} {} {:?}", record.event, record.status, record.retry_count, record.error));
        told.extend(deliveries.iter().map(delivery));
    }
    told
}

fn delivery(delivery: &Delivery) -> String {
    let Delivery { subscription, status, retry_count, verdict, error, replay, .. } = delivery;
    let times = (delivery.due_at.is_some(), delivery.started_at.is_some(), delivery.completed_at.is_some());
    let attempts: Vec<_> = delivery.attempts.iter().map(|attempt| (attempt.number, attempt.verdict)).collect();
    format!("{subscription} {status} {retry_count} {verdict:?} {error:?} {replay} {times:?} {attempts:?}")
}

/// Checks the figures against what is listed.
async fn figures(provider: &dyn Provider) -> ProviderStats {
    let stats = provider.stats().await.unwrap();
    let by_status = [stats.pending_events, stats.processing_events, stats.completed_events, stats.failed_events];
    assert_eq!(by_status.iter().sum::<u64>(), stats.total_events);
    for (status, figure) in Status::ALL.into_iter().zip(by_status) {
        let filter = EventFilter { status: Some(status), ..EventFilter::default() };
        assert_eq!(provider.list(&filter).await.unwrap().records.len() as u64, figure, "{status}");
    }
    let letters = provider.dead_letters(&DeadLetterFilter::default()).await.unwrap().letters;
    assert_eq!(letters.len() as u64, stats.dead_letters);
    ProviderStats { provider_type: "", provider_specific: serde_json::Map::new(), ..stats }
}

/// Figures are counted as things happen, and must never drift from what is there.
pub async fn figures_add_up_after_a_random_walk(scene: Scene) {
    let mut walker = Walker { rng: StdRng::seed_from_u64(7), events: 0, leases: 0 };
    let mut leases = Vec::new();
    for at in 0..400 {
        let step = walker.step();
        if let Step::Advance(by) = step {
            scene.advance(by).await;
        }
        take(&*scene.provider, &mut leases, step).await;
        walker.leases = leases.len();
        if at % 40 == 39 {
            figures(&*scene.provider).await;
        }
    }
    let stats = figures(&*scene.provider).await;
    let kept = contents(&*scene.provider).await;
    let of = |status: Status| {
        let starts = SUBSCRIPTIONS.map(|name| format!("{name} {status} "));
        kept.iter().filter(|line| starts.iter().any(|start| line.starts_with(start))).count() as u64
    };
    assert_eq!(of(Status::Pending), stats.pending_deliveries);
    assert_eq!(of(Status::Processing), stats.processing_deliveries);
    assert_eq!(of(Status::Failed), stats.dead_letters);
}

/// Memory is the reference.
pub async fn a_random_walk_ends_where_the_reference_ends(scene: Scene) {
    if !scene.keeps_key_order() {
        return;
    }
    let time = Arc::new(AtomicI64::new(crate::event::now().as_microsecond()));
    let clock = Arc::clone(&time);
    let reference = MemoryProvider::with_clock(Options::default(), Arc::new(move || clock.load(Relaxed))).unwrap();
    let mut walker = Walker { rng: StdRng::seed_from_u64(20_261_121), events: 0, leases: 0 };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for at in 0..600 {
        let step = walker.step();
        if let Step::Advance(by) = step {
            scene.advance(by).await;
            time.fetch_add(i64::try_from(by.as_micros()).unwrap(), Relaxed);
        }
        let expected = take(&reference, &mut theirs, step.clone()).await;
        let actual = take(&*scene.provider, &mut ours, step.clone()).await;
        assert_eq!(actual, expected, "step {at}: {step:?}");
        walker.leases = ours.len();
    }
    assert_eq!(contents(&*scene.provider).await, contents(&reference).await);
    assert_eq!(figures(&*scene.provider).await, figures(&reference).await);
    assert_eq!(scene.text("b", "n").await, reference_text(&reference).await);
    assert!(!scene.append(vec![event("last")], &[]).await[0].duplicate);
}

async fn reference_text(reference: &dyn Provider) -> Option<String> {
    let document = reference.document("b", "n").await.unwrap()?;
    Some(String::from_utf8(document.value.to_vec()).unwrap())
}
