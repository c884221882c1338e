//! What the host calls of a component: the handler, and the exports that a component may have besides.
//!
//! They are looked for once, when a component is linked, and bound in an instance when they are called.

use std::sync::Arc;

use smallvec::SmallVec;
use wasmtime::Store;
use wasmtime::component::{Instance, InstancePre};
use wasmtime::error::Context as _;

use super::bindings::exports::tidegate::plugin::{batch_handler, handler, lifecycle};
use super::bindings::tidegate::plugin::types::{Failure, Fault, Reply};
use super::bindings::{BATCH_HANDLER, LIFECYCLE};
use super::component::Interface;
use super::convert;
use super::grants::has_export;
use super::imports::State;
use crate::event::Event;

/// What a guest decides about one event.
pub(super) type Answer = Result<Option<Reply>, Failure>;

/// What it decides about the events of a call; most calls have one.
pub(super) type Answers = SmallVec<[Answer; 1]>;

/// Which export is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Export {
    /// The handler of single events.
    Handle,
    /// The handler of batches.
    HandleBatch,
    /// The self-check, where there is one. Without one it has passed.
    SelfCheck,
}

/// Where the exports of a component are.
#[derive(Clone)]
pub(super) struct Exports {
    handler: handler::GuestIndices,
    batch: Option<batch_handler::GuestIndices>,
    lifecycle: Option<lifecycle::GuestIndices>,
}

/// An instance, and those of its exports that were called.
pub(super) struct Bound {
    instance: Instance,
    handler: Option<handler::Guest>,
    batch: Option<batch_handler::Guest>,
    lifecycle: Option<lifecycle::Guest>,
}

impl Exports {
    /// Looks for them in a component that says that it has this interface.
    ///
    /// # Errors
    /// The engine's, where an interface lacks a function.
    pub(super) fn find(pre: &InstancePre<State>, interface: &Interface) -> wasmtime::Result<Self> {
        let has = |name| has_export(&interface.exports, name);
        Self::of(pre, has(BATCH_HANDLER), has(LIFECYCLE))
    }

    /// Looks for the same ones in the same component on another engine.
    ///
    /// # Errors
    /// Those of [`find`](Self::find), which there are none of.
    pub(super) fn again(&self, pre: &InstancePre<State>) -> wasmtime::Result<Self> {
        Self::of(pre, self.batch.is_some(), self.lifecycle.is_some())
    }

    fn of(pre: &InstancePre<State>, has_batch: bool, has_lifecycle: bool) -> wasmtime::Result<Self> {
        Ok(Self {
            handler: handler::GuestIndices::new(pre)?,
            batch: has_batch.then(|| batch_handler::GuestIndices::new(pre)).transpose()?,
            lifecycle: has_lifecycle.then(|| lifecycle::GuestIndices::new(pre)).transpose()?,
        })
    }

    /// Binds what this call needs and was not bound before; a self-check finds out whether all can be.
    ///
    /// # Errors
    /// The engine's, where a function is of another type.
    pub(super) fn bind(&self, bound: &mut Bound, store: &mut Store<State>, export: Export) -> wasmtime::Result<()> {
        let Bound { instance, handler, batch, lifecycle } = bound;
        let needs = |one| export == one || export == Export::SelfCheck;
        if handler.is_none() && needs(Export::Handle) {
            *handler = Some(self.handler.load(&mut *store, instance)?);
        }
        if let Some(indices) = &self.batch
            && batch.is_none()
            && needs(Export::HandleBatch)
        {
            *batch = Some(indices.load(&mut *store, instance).context(BATCH_HANDLER)?);
        }
        if let Some(indices) = &self.lifecycle
            && lifecycle.is_none()
            && needs(Export::SelfCheck)
        {
            *lifecycle = Some(indices.load(&mut *store, instance).context(LIFECYCLE)?);
        }
        Ok(())
    }
}

impl Bound {
    /// An instance of which nothing was called yet.
    pub(super) fn new(instance: Instance) -> Self {
        Self { instance, handler: None, batch: None, lifecycle: None }
    }

    /// Calls a bound export with these events. The answers are as many as the guest gives.
    ///
    /// # Errors
    /// Whatever ended the call before its answers.
    pub(super) async fn call(
        &self,
        export: Export,
        store: &mut Store<State>,
        events: &[Arc<Event>],
    ) -> wasmtime::Result<Answers> {
        match (export, events, &self.handler, &self.batch) {
            (Export::Handle, [event], Some(handler), _) => {
                Ok(Answers::from_buf([handle(handler, store, event).await?]))
            }
            (Export::HandleBatch, .., Some(batch)) => Ok(handle_batch(batch, store, events).await?.into()),
            (Export::SelfCheck, ..) => Ok(Answers::from_buf([self.self_check(store).await?])),
            _ => Err(wasmtime::Error::msg("the component has no export for this call")),
        }
    }

    async fn self_check(&self, store: &mut Store<State>) -> wasmtime::Result<Answer> {
        let Some(lifecycle) = &self.lifecycle else { return Ok(Ok(None)) };
        let failed = |message| Failure::Reject(Fault { code: String::new(), message, details: Vec::new() });
        Ok(lifecycle.call_self_check(store).await?.map(|()| None).map_err(failed))
    }
}

async fn handle(handler: &handler::Guest, store: &mut Store<State>, event: &Event) -> wasmtime::Result<Answer> {
    let spelled_out = convert::spelled_out(event);
    let attributes = convert::attributes(event, &spelled_out);
    handler.call_handle(store, convert::guest_event(event, &attributes)).await
}

async fn handle_batch(
    batch: &batch_handler::Guest,
    store: &mut Store<State>,
    events: &[Arc<Event>],
) -> wasmtime::Result<Vec<Answer>> {
    let spelled_out: Vec<_> = events.iter().map(|event| convert::spelled_out(event)).collect();
    let attributes: Vec<_> =
        events.iter().zip(&spelled_out).map(|(event, spelled_out)| convert::attributes(event, spelled_out)).collect();
    let events: Vec<_> =
        events.iter().zip(&attributes).map(|(event, attributes)| convert::guest_event(event, attributes)).collect();
    batch.call_handle_batch(store, &events).await
}
