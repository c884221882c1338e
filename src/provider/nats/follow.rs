//! Reading the stream, message by message, and applying it; and finding the way back when that is not possible.
//!
//! The state goes on with a stream that still has the message that was applied last. Where it has not, the stream was swept
//! behind a snapshot, and the state is made of that; or the stream is another one, and the state begins with it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, push};
use async_nats::jetstream::stream::{Config, DiscardPolicy, StorageType};
use async_nats::{Message, StatusCode, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout};

use super::Shared;
use super::core::{Core, FORMAT, Incoming};
use super::entry::{Facts, Move, PART, Part};
use super::send::foreign;
use crate::error::{Error, Result};
use crate::provider::pause::pause;

/// How often the server says that it is still there while there is nothing to say.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// The least time between two beginnings.
const BREATH: Duration = Duration::from_millis(50);

/// Messages as they come.
struct Source {
    messages: Subscriber,
    /// How many came.
    count: u64,
    /// Once this place is applied, what was sent before the connection broke for the how many-th time is there or will
    /// not come.
    known: Option<(u64, u64)>,
}

/// Makes what is missing, reads what there is, and follows it from then on.
pub(super) async fn start(shared: &Arc<Shared>, mut changes: mpsc::Receiver<()>) -> Result<AbortHandle> {
    let source = begin(shared).await?;
    let _none_yet = changes.try_recv();
    let follower = tokio::spawn(run(Arc::clone(shared), source, changes)).abort_handle();
    let caught_up = async {
        let target = shared.stream_state("read the log").await?.last_sequence;
        let mut applied = shared.applied.subscribe();
        loop {
            let place = *applied.borrow_and_update();
            if place >= target {
                return Ok(());
            }
            // A long log takes its time; one that stands still does not come.
            let moves = timeout(shared.link.options.response_timeout, applied.changed()).await;
            moves.map_err(|_elapsed| shared.link.late("read the log"))?.map_err(|_gone| Error::Stopped("provider"))?;
        }
    };
    let known = caught_up.await.and_then(|()| match shared.core.lock().is_foreign {
        true => Err(foreign(&shared.link.names.log)),
        false => Ok(()),
    });
    known.inspect_err(|_| follower.abort())?;
    Ok(follower)
}

async fn run(shared: Arc<Shared>, first: Source, mut changes: mpsc::Receiver<()>) {
    let mut source = Some(first);
    let mut failures = 0;
    loop {
        let began = Instant::now();
        let ended = match source.take() {
            Some(source) => follow(&shared, source, &mut changes).await,
            None => match begin(&shared).await {
                Ok(begun) => {
                    // What was to be heard meanwhile may have been anything.
                    shared.tick();
                    (source, failures) = (Some(begun), 0);
                    continue;
                }
                Err(error) => Err(error),
            },
        };
        match ended {
            Err(Error::Stopped(_)) => return,
            Ok(()) => tokio::time::sleep(BREATH.saturating_sub(began.elapsed())).await,
            Err(error) => {
                tracing::warn!(%error, cause = ?error, "cannot follow the stream; trying again");
                tokio::select! {
                    () = tokio::time::sleep(pause(failures)) => {}
                    _ = changes.recv() => {}
                }
                failures += 1;
            }
        }
    }
}

/// Brings the state to where the stream can go on from, and has the server send what comes then.
async fn begin(shared: &Arc<Shared>) -> Result<Source> {
    let link = &shared.link;
    for config in [link.names.log_config(&link.options), link.names.snapshots_config(&link.options)] {
        make(shared, config).await?;
    }
    let breaks = link.breaks();
    let state = shared.stream_state("read the log").await?;
    let (applied, stamp) = {
        let core = shared.core.lock();
        (core.applied, core.stamp)
    };
    if applied == 0 || !shared.stands(applied, stamp).await? {
        let core = if let Some(core) = shared.load().await? {
            core
        } else if state.messages == 0 {
            let epoch = uuid::Uuid::new_v4().to_string();
            let begin = Move::Begin { epoch, format: FORMAT, after: state.last_sequence };
            // Of those who do so at once one is the first, and the others' come to nothing.
            shared.announce(&begin).await?;
            Core::new(state.last_sequence)
        } else if state.first_sequence == 1 {
            Core::new(0)
        } else {
            let words = "the beginning of the log was removed, and there is no snapshot of it: restore the streams from a \
                backup, or delete them to begin anew";
            return Err(link.failed("read the log", words));
        };
        let place = core.applied;
        *shared.core.lock() = core;
        shared.waiting.lock().clear();
        shared.applied.send_replace(place);
    }
    let next = shared.core.lock().applied + 1;
    let mut source = subscribe(shared, next).await?;
    if state.last_sequence < next {
        shared.give_up(breaks);
    } else {
        source.known = Some((state.last_sequence, breaks));
    }
    Ok(source)
}

impl Shared {
    /// What was sent before the connection broke for the how many-th time is not there: whoever waits for it is told.
    fn give_up(&self, breaks: u64) {
        self.waiting.lock().retain(|_, (sent, _)| *sent >= breaks);
    }
}

/// Makes a stream where there is none, and refuses one that would lose messages.
async fn make(shared: &Shared, config: Config) -> Result<()> {
    let (link, name) = (&shared.link, config.name.clone());
    let action = format!("make stream {name}");
    link.check_connected(&action)?;
    let made = link.answer(&action, link.context.get_or_create_stream(config)).await?;
    let stream = made.map_err(|error| link.failed(&action, &error.to_string()))?;
    let stands = &stream.cached_info().config;
    let drops = stands.discard != DiscardPolicy::New || !stands.max_age.is_zero() || stands.max_messages > 0;
    if drops || stands.max_messages_per_subject > 0 {
        let reason = format!(
            "stream {name} has limits that drop what nobody has read: it must have discard new and no max age, max messages \
             and max messages per subject"
        );
        return Err(Error::invalid("provider", &link.server, reason));
    }
    if name == link.names.log {
        shared.is_in_memory.store(stands.storage == StorageType::Memory, Ordering::Relaxed);
    }
    Ok(())
}

/// Has the server send what comes from this place on.
async fn subscribe(shared: &Shared, next: u64) -> Result<Source> {
    const ACTION: &str = "follow the stream";
    let link = &shared.link;
    let inbox = link.client.new_inbox();
    let messages = link.client.subscribe(inbox.clone()).await;
    let messages = messages.map_err(|error| link.failed(ACTION, &error.to_string()))?;
    let config = push::Config {
        deliver_subject: inbox,
        deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: next },
        ack_policy: AckPolicy::None,
        flow_control: true,
        idle_heartbeat: HEARTBEAT,
        num_replicas: 1,
        memory_storage: true,
        ..push::Config::default()
    };
    let before = crate::event::now().as_microsecond();
    let consumer = link.answer(ACTION, link.context.create_consumer_on_stream(config, &link.names.log)).await?;
    let consumer = consumer.map_err(|error| link.failed(ACTION, &error.to_string()))?;
    let after = crate::event::now().as_microsecond();
    let created = i64::try_from(consumer.cached_info().created.unix_timestamp_nanos() / 1_000).unwrap_or(after);
    *shared.time.lock() = (created, Instant::now());
    *shared.clocks.lock() = (created, before, after);
    Ok(Source { messages, count: 0, known: None })
}

/// Applies what comes. `Ok` when it is time to look anew.
async fn follow(shared: &Arc<Shared>, mut source: Source, changes: &mut mpsc::Receiver<()>) -> Result<()> {
    loop {
        let message = tokio::select! {
            biased;
            message = timeout(2 * HEARTBEAT + HEARTBEAT / 2, source.messages.next()) => message,
            _ = changes.recv() => return Ok(()),
            () = shared.look.notified() => return Ok(()),
        };
        shared.link.check_open()?;
        let broken = |words: &str| shared.link.failed("follow the stream", words);
        let message = message.map_err(|_elapsed| broken("the server fell silent"))?;
        let message = message.ok_or_else(|| broken("the connection was closed"))?;
        match message.status {
            None => take(shared, &mut source, message)?,
            Some(StatusCode::IDLE_HEARTBEAT) => beat(shared, &source, &message).await?,
            Some(status) => return Err(broken(&format!("the server ended it: {status}"))),
        }
        let is_due = shared.is_due(&shared.core.lock());
        if is_due || shared.is_full.swap(false, Ordering::Relaxed) {
            let shared = Arc::clone(shared);
            tokio::spawn(async move { shared.save_unless_busy().await });
        }
    }
}

/// A sign of life: says how many messages came, or wants to know that they did.
async fn beat(shared: &Shared, source: &Source, message: &Message) -> Result<()> {
    let header = |name: &str| message.headers.as_ref()?.get(name).map(|value| value.as_str().to_owned());
    let asked = message.reply.as_ref().map(ToString::to_string).or_else(|| header("Nats-Consumer-Stalled"));
    if let Some(subject) = asked {
        let answered = shared.link.client.publish(subject, Bytes::new()).await;
        return answered.map_err(|error| shared.link.failed("follow the stream", &error.to_string()));
    }
    match header("Nats-Last-Consumer").and_then(|count| count.parse::<u64>().ok()) {
        Some(count) if count != source.count => {
            Err(shared.link.failed("follow the stream", "messages were lost on the way"))
        }
        _ => Ok(()),
    }
}

fn take(shared: &Shared, source: &mut Source, message: Message) -> Result<()> {
    let broken = |words: &str| shared.link.failed("follow the stream", words);
    let (at, count, stamp) =
        message.reply.as_deref().and_then(delivered).ok_or_else(|| broken("a message has no place"))?;
    source.count += 1;
    if count != source.count {
        return Err(broken("messages were lost on the way"));
    }
    let headers = message.headers.unwrap_or_default();
    let part = headers.get(PART).and_then(|part| Part::read(part.as_str()));
    let incoming = Incoming { at, stamp, part, facts: Facts::read(&headers), body: message.payload };
    shared.meet(stamp / 1_000);
    let applied = {
        let mut core = shared.core.lock();
        if at != core.applied + 1 {
            return Err(broken("messages were removed from the stream"));
        }
        core.apply(incoming)
    };
    if let Some(((session, number), outcome)) = applied {
        if session == shared.session
            && let Some((_, waiting)) = shared.waiting.lock().remove(&number)
        {
            drop(waiting.send(outcome));
        }
        shared.tick();
    }
    shared.applied.send_replace(at);
    if let Some((_, breaks)) = source.known.take_if(|(place, _)| *place <= at) {
        shared.give_up(breaks);
    }
    Ok(())
}

/// Place in the stream, number of the delivery and time in nanoseconds, from the subject of the answer that a message
/// wants: `$JS.ACK.[domain.account.]stream.consumer.deliveries.place.number.time.pending[.token]`, as of ADR-15.
fn delivered(subject: &str) -> Option<(u64, u64, i64)> {
    let words: Vec<&str> = subject.strip_prefix("$JS.ACK.")?.split('.').collect();
    let skip = if words.len() > 7 { 5 } else { 3 };
    let mut numbers = words.get(skip..)?.iter();
    let mut number = || numbers.next()?.parse::<u64>().ok();
    let (at, count, time) = (number()?, number()?, number()?);
    Some((at, count, i64::try_from(time).ok()?))
}
