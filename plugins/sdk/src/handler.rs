//! Which functions are handlers, of single events and of batches: the shapes of arguments and results that `plugin!` takes.

use serde::de::DeserializeOwned;

use crate::{Event, Failure, Json, Reply, delivery};

/// A function that a plugin can be made of. It takes one of
///
/// * [`Event`]: the event as it is,
/// * [`Json<T>`]: the payload as `T`; another shape is rejected with the code `invalid-payload`,
/// * `(Json<T>, Event)`: both, as two arguments,
///
/// and gives back an [`Outcome`].
pub trait Handler<Arguments> {
    /// Handles one event.
    fn call(&self, event: Event) -> Result<Option<Reply>, Failure>;
}

/// A function that handles many events at once. It takes them as `&[Event]` and gives back an [`Outcome`] for each, in the
/// same order; fewer or more decide nothing, and the host then calls the [`Handler`] for each event.
///
/// It calls [`delivery::turn`] before it does anything on behalf of an event.
pub trait BatchHandler {
    /// Handles all of them.
    fn call(&self, events: &[Event]) -> Vec<Result<Option<Reply>, Failure>>;
}

impl<F, R> BatchHandler for F
where
    F: Fn(&[Event]) -> Vec<R>,
    R: Outcome,
{
    fn call(&self, events: &[Event]) -> Vec<Result<Option<Reply>, Failure>> {
        self(events).into_iter().map(Outcome::into_result).collect()
    }
}

/// Handles one event after the other, each in its turn.
pub(crate) fn in_turn<Arguments>(
    handler: &impl Handler<Arguments>,
    events: impl IntoIterator<Item = Event>,
) -> Vec<Result<Option<Reply>, Failure>> {
    let turn = |(index, event)| {
        delivery::turn(index);
        handler.call(event)
    };
    events.into_iter().enumerate().map(turn).collect()
}

/// What a handler may give back: `()`, a [`Reply`], an `Option<Reply>`, or a `Result` of one of these and anything that
/// becomes a [`Failure`].
pub trait Outcome {
    /// The same in the interface's terms.
    fn into_result(self) -> Result<Option<Reply>, Failure>;
}

impl Outcome for () {
    fn into_result(self) -> Result<Option<Reply>, Failure> {
        Ok(None)
    }
}

impl Outcome for Reply {
    fn into_result(self) -> Result<Option<Reply>, Failure> {
        Ok(Some(self))
    }
}

impl Outcome for Option<Reply> {
    fn into_result(self) -> Result<Option<Reply>, Failure> {
        Ok(self)
    }
}

impl<T: Outcome, E: Into<Failure>> Outcome for Result<T, E> {
    fn into_result(self) -> Result<Option<Reply>, Failure> {
        match self {
            Ok(outcome) => outcome.into_result(),
            Err(why) => Err(why.into()),
        }
    }
}

impl<F, R> Handler<(Event,)> for F
where
    F: Fn(Event) -> R,
    R: Outcome,
{
    fn call(&self, event: Event) -> Result<Option<Reply>, Failure> {
        self(event).into_result()
    }
}

impl<F, T, R> Handler<(Json<T>,)> for F
where
    F: Fn(Json<T>) -> R,
    T: DeserializeOwned,
    R: Outcome,
{
    fn call(&self, event: Event) -> Result<Option<Reply>, Failure> {
        self(Json(event.json()?)).into_result()
    }
}

impl<F, T, R> Handler<(Json<T>, Event)> for F
where
    F: Fn(Json<T>, Event) -> R,
    T: DeserializeOwned,
    R: Outcome,
{
    fn call(&self, event: Event) -> Result<Option<Reply>, Failure> {
        self(Json(event.json()?), event).into_result()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::{Event, Failure, Handler, Json, Reply, testing};

    fn run<A>(handler: impl Handler<A>, payload: &Value) -> Result<Option<Reply>, Failure> {
        handler.call(testing::event("shop.orders.create", payload))
    }

    #[test]
    fn every_documented_shape_of_function_is_a_handler() {
        let payload = json!({"n": 1});
        assert_eq!(run(|_: Event| (), &payload), Ok(None));
        assert_eq!(
            run(|event: Event| Reply::text(event.event_type), &payload),
            Ok(Some(Reply::text("shop.orders.create")))
        );
        assert_eq!(run(|Json(_): Json<Value>| None::<Reply>, &payload), Ok(None));
        assert_eq!(
            run(
                |Json(value): Json<Value>, event: Event| Ok::<_, Failure>(Reply::text(format!("{value} {}", event.id))),
                &payload
            ),
            Ok(Some(Reply::text("{\"n\":1} test-event")))
        );
    }

    #[test]
    fn a_payload_that_does_not_fit_never_reaches_the_handler() {
        let failure = run(|Json(()): Json<()>| (), &json!({"n": 1})).unwrap_err();
        assert_eq!(failure.code(), "invalid-payload");
    }
}
