//! A host to test handlers against, in plain `cargo test`.
//!
//! ```
//! use tidegate_plugin::{Failure, Json, kv, testing::{self, Host}};
//!
//! fn count(Json(order): Json<serde_json::Value>) -> Result<(), Failure> {
//!     kv::bucket("orders").increment("seen", 1)?;
//!     Ok(())
//! }
//!
//! let host = Host::new();
//! host.deliver(count, testing::event("shop.orders.create", &serde_json::json!({}))).unwrap();
//! assert_eq!(host.kv_number("orders", "seen"), Some(1));
//! ```
//!
//! It keeps the host's promises that a handler can rely on: what a failed attempt wrote and published is gone, and with
//! [`Host::for_manifest`] whatever `plugin.toml` does not request is denied. It knows no limits, no time and no retries.
//! There is one host per thread; a new one replaces the one before.

use core::{cell::RefCell, marker::PhantomData};
use std::collections::{BTreeMap, BTreeSet};

use globset::{GlobBuilder, GlobMatcher};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{BatchHandler, Event, Failure, Fault, Handler, Reply, handler::in_turn, host, log::Level};

thread_local! {
    static STATE: RefCell<State> = RefCell::new(State::default());
}

pub(crate) fn with_state<T>(work: impl FnOnce(&mut State) -> T) -> T {
    STATE.with_borrow_mut(work)
}

/// An event as the host would hand it over: the type's three segments are its schema, entity and operation.
pub fn event(event_type: &str, payload: &impl Serialize) -> Event {
    let names = ["schema", "entity", "operation"];
    let segments: Vec<&str> = event_type.split('.').collect();
    let known = if segments.len() == names.len() { segments } else { Vec::new() };
    Event {
        id: "test-event".to_owned(),
        sequence: 1,
        event_type: event_type.to_owned(),
        source: "system".to_owned(),
        created_at_ms: 1_767_225_600_000,
        content_type: "application/json".to_owned(),
        // A payload without a JSON form is delivered as none, which no typed handler accepts.
        payload: serde_json::to_vec(payload).unwrap_or_default(),
        attributes: names.iter().zip(known).map(|(name, segment)| ((*name).to_owned(), segment.to_owned())).collect(),
    }
}

impl Event {
    /// The event with one more attribute, by its name on the wire.
    pub fn with_attribute(mut self, name: &str, value: &str) -> Self {
        self.attributes.push((name.to_owned(), value.to_owned()));
        self
    }
}

impl Reply {
    /// The body read as `T`.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.body)
    }
}

/// The host of this thread.
#[derive(Debug)]
pub struct Host {
    /// Not to be sent to another thread, where it would be another host.
    here: PhantomData<*const ()>,
}

impl Host {
    /// A host that grants everything and keeps nothing yet.
    #[expect(clippy::new_without_default, reason = "a default that replaces the thread's host would surprise")]
    pub fn new() -> Self {
        STATE.set(State::default());
        Self { here: PhantomData }
    }

    /// A host that grants what this `plugin.toml` requests and nothing else:
    /// `Host::for_manifest(include_str!("../plugin.toml"))`.
    pub fn for_manifest(manifest: &str) -> Result<Self, String> {
        let manifest: Requests = toml::from_str(manifest).map_err(|why| why.to_string())?;
        let host = Self::new();
        let requested = Requested {
            kv: manifest.capabilities.kv.into_iter().collect(),
            config: manifest.capabilities.config.into_iter().collect(),
            events: manifest
                .capabilities
                .events
                .iter()
                .map(|pattern| TypePattern::new(pattern))
                .collect::<Result<_, _>>()?,
        };
        with_state(|state| {
            state.grants = Grants::Requested(requested);
            state.subscription = manifest.name;
        });
        Ok(host)
    }

    /// Sets one setting of the operator's.
    pub fn config(self, key: &str, value: &str) -> Self {
        with_state(|state| state.config.insert(key.to_owned(), value.to_owned()));
        self
    }

    /// Says which attempt is in progress, out of how many.
    pub fn attempt(self, attempt: u32, of: u32) -> Self {
        with_state(|state| (state.attempt, state.max_attempts) = (attempt, of));
        self
    }

    /// Says that deliveries are replays.
    pub fn replaying(self) -> Self {
        with_state(|state| state.replay = true);
        self
    }

    /// Calls the handler. What a failed attempt wrote and published is undone; what it logged stays.
    pub fn deliver<Arguments>(&self, handler: impl Handler<Arguments>, event: Event) -> Result<Option<Reply>, Failure> {
        with_state(|state| state.deliver(1));
        let result = handler.call(event);
        with_state(|state| state.end(&[result.is_ok()]));
        result
    }

    /// Calls the handler with all of these events in one call, each in its turn, as `plugin!(handler, batch)` does.
    pub fn deliver_all<Arguments>(
        &self,
        handler: impl Handler<Arguments>,
        events: Vec<Event>,
    ) -> Vec<Result<Option<Reply>, Failure>> {
        with_state(|state| state.deliver(events.len()));
        let results = in_turn(&handler, events);
        with_state(|state| state.end(&successes(&results)));
        results
    }

    /// Calls a handler of batches, that of `plugin!(_, batch = handler)`. An event sees nothing of what the others write.
    /// A number of results other than that of the events decides nothing: all is undone.
    pub fn deliver_batch(&self, handler: impl BatchHandler, events: &[Event]) -> Vec<Result<Option<Reply>, Failure>> {
        with_state(|state| state.deliver(events.len()));
        let results = handler.call(events);
        let successes = if results.len() == events.len() { successes(&results) } else { Vec::new() };
        with_state(|state| state.end(&successes));
        results
    }

    /// Keeps a value before a delivery, also in a bucket that is not granted.
    pub fn set_kv(&self, bucket: &str, key: &str, value: impl Into<Vec<u8>>) {
        with_state(|state| {
            state.settle();
            state.values.entry(bucket.to_owned()).or_default().insert(key.to_owned(), value.into());
            state.begin(1);
        });
    }

    /// What is kept under a key.
    pub fn kv(&self, bucket: &str, key: &str) -> Option<Vec<u8>> {
        with_state(|state| {
            state.settle();
            state.values.get(bucket)?.get(key).cloned()
        })
    }

    /// The number that is kept under a key.
    pub fn kv_number(&self, bucket: &str, key: &str) -> Option<i64> {
        host::number(&self.kv(bucket, key)?)
    }

    /// All lines so far.
    pub fn logs(&self) -> Vec<LogLine> {
        with_state(|state| state.logs.clone())
    }

    /// All events published so far by attempts that succeeded.
    pub fn published(&self) -> Vec<Published> {
        with_state(|state| {
            state.settle();
            state.published.clone()
        })
    }
}

fn successes(results: &[Result<Option<Reply>, Failure>]) -> Vec<bool> {
    results.iter().map(Result::is_ok).collect()
}

/// A line that a handler logged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// How much it matters.
    pub level: Level,
    /// The message.
    pub message: String,
    /// What varies.
    pub fields: Vec<(String, String)>,
}

impl LogLine {
    /// One field by its name.
    pub fn field(&self, name: &str) -> Option<&str> {
        let (_, value) = self.fields.iter().find(|(known, _)| known == name)?;
        Some(value)
    }
}

/// An event that a handler published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The id that the handler was told.
    pub id: String,
    /// Its type.
    pub event_type: String,
    /// What the payload is.
    pub content_type: String,
    /// The payload.
    pub payload: Vec<u8>,
    /// Its attributes.
    pub attributes: Vec<(String, String)>,
}

impl Published {
    /// The payload read as `T`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.payload)
    }
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) grants: Grants,
    pub(crate) config: BTreeMap<String, String>,
    pub(crate) subscription: String,
    pub(crate) attempt: u32,
    pub(crate) max_attempts: u32,
    pub(crate) remaining_ms: u64,
    pub(crate) replay: bool,
    pub(crate) logs: Vec<LogLine>,
    /// How many ids of published events were given away.
    pub(crate) ids: usize,
    /// The attempt in progress.
    pub(crate) work: Work,
    published: Vec<Published>,
    values: Values,
    turn: usize,
    /// Whether the handler has said whose turn it is, or there is only one.
    is_said: bool,
    /// The attempts of the call whose turn it is not.
    others: BTreeMap<usize, Work>,
}

/// Values by bucket and key.
type Values = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

/// What one attempt sees and wants done.
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) published: Vec<Published>,
    values: Values,
    changes: Vec<(String, String, Change)>,
}

/// What is done to a value.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Set(Vec<u8>),
    Delete,
    Add(i64),
}

impl Change {
    fn apply(self, values: &mut BTreeMap<String, Vec<u8>>, key: String) {
        match self {
            Self::Set(value) => drop(values.insert(key, value)),
            Self::Delete => drop(values.remove(&key)),
            Self::Add(by) => {
                let before = values.get(&key).and_then(|bytes| host::number(bytes)).unwrap_or_default();
                values.insert(key, before.saturating_add(by).to_string().into_bytes());
            }
        }
    }
}

impl Default for State {
    /// The first of four attempts, with the time and the number of retries that a server gives by default.
    fn default() -> Self {
        Self {
            grants: Grants::Everything,
            config: BTreeMap::new(),
            subscription: "test".to_owned(),
            attempt: 1,
            max_attempts: 4,
            remaining_ms: 30_000,
            replay: false,
            logs: Vec::new(),
            ids: 0,
            work: Work::default(),
            published: Vec::new(),
            values: BTreeMap::new(),
            turn: 0,
            is_said: true,
            others: BTreeMap::new(),
        }
    }
}

impl State {
    pub(crate) fn bucket(&mut self, name: &str) -> Result<&mut BTreeMap<String, Vec<u8>>, Fault> {
        self.grants.bucket(name)?;
        Ok(self.work.values.entry(name.to_owned()).or_default())
    }

    pub(crate) fn write(&mut self, bucket: &str, key: &str, change: Change) -> Result<(), Fault> {
        self.check_turn()?;
        change.clone().apply(self.bucket(bucket)?, key.to_owned());
        self.work.changes.push((bucket.to_owned(), key.to_owned(), change));
        Ok(())
    }

    pub(crate) fn check_turn(&self) -> Result<(), Fault> {
        match self.is_said {
            true => Ok(()),
            false => Err(Fault::new("no-turn", "in a batch, delivery::turn says whose event it is")),
        }
    }

    #[expect(clippy::panic, reason = "a call that the host would end is a test that fails")]
    pub(crate) fn take_turn(&mut self, index: u32) {
        let next = usize::try_from(index).unwrap_or(usize::MAX);
        self.is_said = true;
        if next == self.turn {
            return;
        }
        let Some(work) = self.others.remove(&next) else {
            panic!("there is no turn {index}: the call has {} events", self.others.len().saturating_add(1));
        };
        self.others.insert(self.turn, core::mem::replace(&mut self.work, work));
        self.turn = next;
    }

    /// What is done outside of a delivery succeeds.
    fn settle(&mut self) {
        self.end(&[true]);
    }

    /// Begins the attempts of a call.
    fn deliver(&mut self, count: usize) {
        self.settle();
        self.begin(count);
    }

    /// Begins this many attempts, none of which sees what another writes.
    fn begin(&mut self, count: usize) {
        let fresh = || Work { values: self.values.clone(), ..Work::default() };
        self.others = (1..count).map(|index| (index, fresh())).collect();
        self.work = fresh();
        (self.turn, self.is_said) = (0, count == 1);
    }

    /// Carries out what the successful attempts want done, in their order, and forgets the others.
    fn end(&mut self, successes: &[bool]) {
        self.others.insert(self.turn, core::mem::take(&mut self.work));
        for ((_, work), _) in core::mem::take(&mut self.others).into_iter().zip(successes).filter(|(_, ok)| **ok) {
            for (bucket, key, change) in work.changes {
                change.apply(self.values.entry(bucket).or_default(), key);
            }
            self.published.extend(work.published);
        }
        self.begin(1);
    }
}

#[derive(Debug)]
pub(crate) enum Grants {
    Everything,
    Requested(Requested),
}

#[derive(Debug)]
pub(crate) struct Requested {
    kv: BTreeSet<String>,
    config: BTreeSet<String>,
    events: Vec<TypePattern>,
}

impl Grants {
    pub(crate) fn config(&self, key: &str) -> bool {
        match self {
            Self::Everything => true,
            Self::Requested(requested) => requested.config.contains(key),
        }
    }

    pub(crate) fn publish(&self, event_type: &str) -> Result<(), Fault> {
        match self {
            Self::Requested(requested) if !requested.events.iter().any(|pattern| pattern.matches(event_type)) => {
                Err(denied("events", event_type))
            }
            _ => Ok(()),
        }
    }

    fn bucket(&self, name: &str) -> Result<(), Fault> {
        match self {
            Self::Requested(requested) if !requested.kv.contains(name) => Err(denied("kv", name)),
            _ => Ok(()),
        }
    }
}

fn denied(capability: &str, name: &str) -> Fault {
    Fault::new("denied", format!("{name:?} is not granted: request it in plugin.toml, under capabilities.{capability}"))
}

/// What this module reads of a manifest. The host checks the rest.
#[derive(Deserialize)]
struct Requests {
    name: String,
    #[serde(default)]
    capabilities: Capabilities,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Capabilities {
    kv: Vec<String>,
    events: Vec<String>,
    config: Vec<String>,
}

/// A pattern of event types: dots part segments, `*` alone matches all, `*` is one segment and `**` any number.
#[derive(Debug)]
struct TypePattern(GlobMatcher);

impl TypePattern {
    fn new(pattern: &str) -> Result<Self, String> {
        // Types as paths, whose globs have the same rules.
        let path = if pattern == "*" { "**".to_owned() } else { pattern.replace('.', "/") };
        let glob = GlobBuilder::new(&path).literal_separator(true).build();
        glob.map(|glob| Self(glob.compile_matcher())).map_err(|why| why.to_string())
    }

    fn matches(&self, event_type: &str) -> bool {
        self.0.is_match(event_type.replace('.', "/"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Host, TypePattern, event};
    use crate::{Event, Failure, events, kv};

    const MANIFEST: &str =
        "name = \"sample\"\nversion = \"1.0.0\"\n[capabilities]\nkv = [\"seen\"]\nevents = [\"shop.totals.*\"]\n";

    #[test]
    fn of_a_batch_each_event_keeps_its_own_effects() {
        fn count(event: Event) -> Result<(), Failure> {
            let seen = kv::bucket("seen").increment("n", 1)?;
            events::publish("shop.totals.update", &json!({ "seen": seen }))?;
            match event.sequence {
                2 => Err(Failure::reject("no", "the second fails")),
                _ => Ok(()),
            }
        }
        let host = Host::new();
        let events = (1..=3).map(|sequence| Event { sequence, ..event("a.b.c", &json!({})) }).collect();
        let results = host.deliver_all(count, events);
        assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
        assert_eq!(host.kv_number("seen", "n"), Some(2));
        let seen: Vec<serde_json::Value> = host.published().iter().map(|event| event.json().unwrap()).collect();
        assert_eq!(seen, [json!({"seen": 1}), json!({"seen": 1})], "an event sees nothing of the others");
    }

    #[test]
    fn a_handler_of_batches_says_whose_turn_it_is() {
        fn all(events: &[Event]) -> Vec<Result<(), Failure>> {
            assert_eq!(kv::bucket("seen").increment("n", 1).unwrap_err().code, "no-turn");
            assert_eq!(crate::events::publish("a.b.c", &1).unwrap_err().code, "no-turn");
            let write = |(index, event): (usize, &Event)| {
                crate::delivery::turn(index);
                Ok(kv::bucket("seen").set(&event.id, "x")?)
            };
            let mut results: Vec<_> = events.iter().enumerate().rev().map(write).collect();
            results.truncate(2);
            results
        }
        let host = Host::new();
        let named = |id: &str| Event { id: id.to_owned(), ..event("a.b.c", &json!({})) };
        assert_eq!(host.deliver_batch(all, &[named("a"), named("b")]).len(), 2);
        assert!(host.kv("seen", "a").is_some() && host.kv("seen", "b").is_some());
        assert_eq!(host.deliver_batch(all, &[named("c"), named("d"), named("e")]).len(), 2);
        assert_eq!(host.kv("seen", "c"), None, "two answers to three events decide nothing");
    }

    #[test]
    fn a_failed_attempt_leaves_nothing_behind_but_its_log() {
        fn fail(_: Event) -> Result<(), Failure> {
            kv::bucket("seen").increment("n", 1)?;
            events::publish("shop.totals.update", &json!({}))?;
            crate::warn!("about to fail", attempt = crate::delivery::attempt());
            Err(Failure::retry("later", "not now"))
        }
        let host = Host::new();
        host.deliver(fail, event("a.b.c", &json!({}))).unwrap_err();
        assert_eq!(host.kv_number("seen", "n"), None);
        assert!(host.published().is_empty());
        assert_eq!(host.logs()[0].field("attempt"), Some("1"));
    }

    #[test]
    fn what_the_manifest_does_not_request_is_denied() {
        let _host = Host::for_manifest(MANIFEST).unwrap().config("currency", "EUR");
        assert_eq!(kv::bucket("seen").increment("n", 2), Ok(2));
        assert_eq!(kv::bucket("other").get("n").unwrap_err().code, "denied");
        assert!(events::publish("shop.totals.update", &1).is_ok());
        assert_eq!(events::publish("shop.orders.update", &1).unwrap_err().code, "denied");
        assert_eq!(crate::config::get("currency"), None);
        assert_eq!(crate::delivery::subscription(), "sample");
    }

    #[test]
    fn numbers_start_at_zero_and_never_wrap() {
        let host = Host::new();
        host.set_kv("seen", "n", "9223372036854775807");
        host.set_kv("seen", "text", "seven");
        let bucket = kv::bucket("seen");
        assert_eq!(bucket.increment("fresh", -3), Ok(-3));
        assert_eq!(bucket.increment("n", 1).unwrap_err().code, "invalid-value");
        assert_eq!(bucket.increment("text", 1).unwrap_err().code, "invalid-value");
    }

    #[test]
    fn patterns_of_types_follow_segments() {
        let matches = |pattern: &str, event_type: &str| TypePattern::new(pattern).unwrap().matches(event_type);
        assert!(matches("*", "shop.orders.create"));
        assert!(matches("shop.*.create", "shop.orders.create"));
        assert!(!matches("shop.*", "shop.orders.create"));
        assert!(matches("shop.**", "shop.orders.create"));
        assert!(matches("*.*.{create,update}", "shop.orders.update"));
        assert!(!matches("*.*.{create,update}", "shop.orders.delete"));
    }
}
