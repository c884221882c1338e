//! A store on which claims are tried, with short words for what they do to it.

use std::sync::Arc;
use std::time::Duration;

use super::Fixture;
use crate::delivery::{Attempt, Delivery, EventDetail, Fault, KvChange, KvWrite, Next, Seen, Verdict};
use crate::event::{Event, EventId, Payload, Seq, Source};
use crate::provider::inbox::InboxRow;
use crate::provider::{
    Append, Appended, ClaimRequest, Claimed, Lease, LeaseKey, Provider, ProviderStats, Settled, Settlement, Want,
};
use crate::subscription::Ordering;

/// How long the leases of a scene last.
pub(super) const LEASE: Duration = Duration::from_secs(30);

/// A fresh store.
pub struct Scene {
    fixture: Box<dyn Fixture>,
    /// The store.
    pub provider: Arc<dyn Provider>,
}

impl Scene {
    /// A scene on a fresh store.
    pub async fn open(fixture: impl Fixture) -> Self {
        Self { provider: fixture.open().await, fixture: Box::new(fixture) }
    }

    /// Closes the store and opens it again. `false`, with the reason printed, where a store cannot do that.
    pub async fn reopen(&mut self) -> bool {
        self.provider.close().await.unwrap();
        match self.fixture.reopens() {
            Ok(()) => self.provider = self.fixture.open().await,
            Err(reason) => println!("skipped: {reason}"),
        }
        self.fixture.reopens().is_ok()
    }

    /// Another instance on the same store; `None`, with the reason printed, where there can be none.
    pub async fn another(&self) -> Option<Arc<dyn Provider>> {
        let capabilities = self.provider.capabilities();
        if !capabilities.shared {
            println!("skipped: {} belongs to one process", capabilities.provider);
            return None;
        }
        Some(self.fixture.open().await)
    }

    /// Whether the store keeps the order of keys; prints the reason for skipping where it says that it does not.
    pub fn keeps_key_order(&self) -> bool {
        let capabilities = self.provider.capabilities();
        if !capabilities.key_ordering {
            println!("skipped: {} does not keep the order of keys", capabilities.provider);
        }
        capabilities.key_ordering
    }

    /// Lets time pass for the store.
    pub async fn advance(&self, by: Duration) {
        self.fixture.advance(by).await;
    }

    /// Leaves rows in the store's inbox; why not, where there is none.
    pub async fn leave(&self, rows: &[InboxRow]) -> Result<(), &'static str> {
        self.fixture.leave(rows).await
    }

    /// Appends events that all go to these subscriptions.
    pub async fn append(&self, events: Vec<Event>, subscriptions: &[&str]) -> Vec<Appended> {
        self.provider.append(appends(events, subscriptions)).await.unwrap()
    }

    /// Appends `count` plain events, and returns the first seq.
    pub async fn add(&self, count: usize, subscriptions: &[&str]) -> Seq {
        self.append((0..count).map(|_| event("shop.orders.create")).collect(), subscriptions).await[0].seq
    }

    /// Appends one plain event, and returns its id.
    pub async fn add_one(&self, subscriptions: &[&str]) -> EventId {
        let event = event("shop.orders.create");
        let id = event.id.clone();
        self.append(vec![event], subscriptions).await;
        id
    }

    /// Claims for one subscription.
    pub async fn claim(&self, subscription: &str, room: usize) -> Vec<Lease> {
        self.claim_with(&request(&[(subscription, room)], Ordering::None)).await.leases
    }

    /// Claims for one subscription in the order of keys.
    pub async fn claim_by_key(&self, subscription: &str, room: usize) -> Vec<Lease> {
        self.claim_with(&request(&[(subscription, room)], Ordering::Key)).await.leases
    }

    /// Claims the one delivery that must be ready.
    pub async fn claim_one(&self, subscription: &str) -> Lease {
        let mut leases = self.claim(subscription, 1).await;
        assert_eq!(leases.len(), 1, "nothing of {subscription} is ready");
        leases.remove(0)
    }

    /// Claims.
    pub async fn claim_with(&self, request: &ClaimRequest) -> Claimed {
        self.provider.claim(request).await.unwrap()
    }

    /// Settles one claim.
    pub async fn settle(&self, settlement: Settlement) -> Settled {
        self.provider.settle(vec![settlement]).await.unwrap().remove(0)
    }

    /// Ends a claim and expects it to be accepted.
    pub async fn end(&self, lease: &Lease, next: Next) {
        let settled = self.settle(ended(lease, next)).await;
        assert!(matches!(settled, Settled::Done { .. }), "{settled:?}");
    }

    /// Appends one event for `subscription`, claims it and ends it so. Returns its id.
    pub async fn run_one(&self, subscription: &str, next: Next) -> EventId {
        let id = self.add_one(&[subscription]).await;
        let lease = self.claim(subscription, usize::MAX >> 1).await.into_iter().find(|lease| lease.event.id == id);
        self.end(&lease.unwrap(), next).await;
        id
    }

    /// The event, which must be there.
    pub async fn detail(&self, id: &EventId) -> EventDetail {
        self.provider.get(id.as_str()).await.unwrap().unwrap()
    }

    /// The only delivery of the event.
    pub async fn delivery(&self, id: &EventId) -> Delivery {
        let mut deliveries = self.detail(id).await.deliveries;
        assert_eq!(deliveries.len(), 1);
        deliveries.remove(0)
    }

    /// The store's figures.
    pub async fn stats(&self) -> ProviderStats {
        self.provider.stats().await.unwrap()
    }

    /// All of the log after `after`, read in pages of `page`.
    pub async fn log(&self, mut after: Seq, page: usize) -> Vec<Arc<Event>> {
        let mut events = Vec::new();
        loop {
            let read = self.provider.read(after, page).await.unwrap();
            events.extend(read.events);
            if read.next >= read.head {
                return events;
            }
            assert!(read.next > after, "a reader must get on");
            after = read.next;
        }
    }

    /// The text of a document.
    pub async fn text(&self, collection: &str, key: &str) -> Option<String> {
        let document = self.provider.document(collection, key).await.unwrap()?;
        Some(String::from_utf8(document.value.to_vec()).unwrap())
    }
}

/// A plain event.
pub(super) fn event(event_type: &str) -> Event {
    let payload = Payload::json_text("{\"total\": 1.50}").unwrap();
    let mut event = Event::new(Source::System, event_type.parse().unwrap(), payload);
    event.instance_id = "here".into();
    event
}

/// An event with this id.
pub(super) fn event_with_id(id: &str) -> Event {
    Event { id: EventId::parse(id).unwrap(), ..event("shop.orders.create") }
}

/// An event with this ordering key.
pub(super) fn event_with_key(key: &str) -> Event {
    Event { key: Some(key.into()), ..event("shop.orders.update") }
}

/// A list of subscriptions.
pub(super) fn names(subscriptions: &[&str]) -> Arc<[Arc<str>]> {
    subscriptions.iter().map(|&name| Arc::from(name)).collect()
}

/// Events for the same subscriptions.
pub(super) fn appends(events: Vec<Event>, subscriptions: &[&str]) -> Vec<Append> {
    let subscriptions = names(subscriptions);
    let append = |event| Append { event: Arc::new(event), subscriptions: Arc::clone(&subscriptions) };
    events.into_iter().map(append).collect()
}

/// A request for these subscriptions.
pub(super) fn request(wants: &[(&str, usize)], ordering: Ordering) -> ClaimRequest {
    let want = |&(subscription, room): &(&str, usize)| Want { subscription: subscription.into(), room, ordering };
    ClaimRequest { worker: "worker-1".into(), lease: LEASE, wants: wants.iter().map(want).collect() }
}

/// A retry after this many milliseconds.
pub(super) fn retry(millis: u64) -> Next {
    Next::Retry { after: Duration::from_millis(millis) }
}

/// The record of an attempt on this lease.
pub(super) fn attempt(lease: &Lease, verdict: Verdict) -> Attempt {
    let refused = verdict != Verdict::Ok;
    Attempt {
        number: lease.number,
        verdict,
        started_at: crate::event::now(),
        duration_us: 1_234,
        worker: "worker-1".into(),
        error: refused.then(|| Box::new(Fault::new("card", format!("declined {}", lease.number)))),
        reply: None,
        trace: Seen { digest: Some("sha256:ab".into()), fuel: Some(5), ..Seen::default() }.into(),
    }
}

/// The end of a claim, with the verdict that goes with it.
pub(super) fn ended(lease: &Lease, next: Next) -> Settlement {
    let attempt = match next {
        Next::Complete => Some(attempt(lease, Verdict::Ok)),
        Next::Retry { .. } => Some(attempt(lease, Verdict::Retry)),
        Next::Fail => Some(attempt(lease, Verdict::Reject)),
        Next::Release => None,
    };
    Settlement { key: lease.key.clone(), next, attempt, published: Vec::new(), writes: Vec::new() }
}

/// As [`ended`], with another verdict.
pub(super) fn ended_by(lease: &Lease, next: Next, verdict: Verdict) -> Settlement {
    Settlement { attempt: Some(attempt(lease, verdict)), ..ended(lease, next) }
}

/// A success that writes.
pub(super) fn success_with(lease: &Lease, writes: Vec<KvWrite>) -> Settlement {
    Settlement { writes, ..ended(lease, Next::Complete) }
}

/// A write to bucket `b`.
pub(super) fn write(key: &str, change: KvChange) -> KvWrite {
    KvWrite { bucket: "b".into(), key: key.into(), change }
}

/// A write that stores text for ever.
pub(super) fn set(key: &str, value: &str) -> KvWrite {
    write(key, KvChange::Set { value: value.to_owned().into(), ttl: None })
}

/// The claim's key with a token that was never given out.
pub(super) fn forged(key: &LeaseKey) -> LeaseKey {
    LeaseKey { token: key.token ^ 1, ..key.clone() }
}

/// The seqs of leases.
pub(super) fn seqs(leases: &[Lease]) -> Vec<Seq> {
    leases.iter().map(|lease| lease.key.seq).collect()
}
