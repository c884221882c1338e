//! What the host calls of a component: the handler, and the exports that a component may have besides.
//!
//! They are looked for once, when a component is linked, and bound in an instance when they are called. Whether they have
//! the types that we call is a matter of the component, and checked in its first instance only.

use std::sync::{Arc, OnceLock};

use smallvec::SmallVec;
use wasmtime::Store;
use wasmtime::component::{
    ComponentExportIndex, ComponentNamedList, Func, Instance, InstancePre, Lift, Lower, TypedFunc,
};
use wasmtime::error::Context as _;

use super::bindings::exports::tidegate::plugin::packed_batch_handler::PackedEvent;
use super::bindings::exports::tidegate::plugin::{batch_handler, handler, lifecycle, packed_batch_handler};
use super::bindings::tidegate::plugin::types::{self, Failure, Fault, Reply};
use super::bindings::{BATCH_HANDLER, HANDLER, LIFECYCLE, PACKED_BATCH_HANDLER, VERSION};
use super::component::Interface;
use super::convert::{self, Packed};
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
pub(super) struct Exports {
    handler: Entry<handler::GuestIndices>,
    batch: Option<Batch>,
    lifecycle: Option<lifecycle::GuestIndices>,
}

/// Where the handler of batches is, by how it takes the events.
enum Batch {
    Listed(Entry<batch_handler::GuestIndices>),
    Packed(Entry<packed_batch_handler::GuestIndices>),
}

/// Where an export is that is called for events.
struct Entry<I> {
    /// Those that check types.
    indices: I,
    function: ComponentExportIndex,
    /// Filled once the function was found to be of the type that we call.
    checked: OnceLock<()>,
}

/// An instance, and those of its exports that were called.
pub(super) struct Bound {
    instance: Instance,
    handler: Option<Handle>,
    batch: Option<HandleBatch>,
    lifecycle: Option<lifecycle::Guest>,
}

/// A function that was found to be the handler of single events.
#[derive(Clone, Copy)]
struct Handle(Func);

/// A function that was found to be a handler of batches.
#[derive(Clone, Copy)]
enum HandleBatch {
    Listed(Func),
    Packed(Func),
}

impl<I> Entry<I> {
    fn find(pre: &InstancePre<State>, indices: I, interface: &str, function: &str) -> wasmtime::Result<Self> {
        let component = pre.component();
        let interface = component.get_export_index(None, format!("{interface}@{VERSION}").as_str());
        let function = interface.and_then(|interface| component.get_export_index(Some(&interface), function));
        let function = function.ok_or_else(|| wasmtime::Error::msg("an export that was found is not there"))?;
        Ok(Self { indices, function, checked: OnceLock::new() })
    }

    /// The function in an instance; the first time it is `check`ed.
    fn bind(
        &self,
        store: &mut Store<State>,
        instance: &Instance,
        check: impl FnOnce(&I, &mut Store<State>) -> wasmtime::Result<()>,
    ) -> wasmtime::Result<Option<Func>> {
        if self.checked.get().is_none() {
            check(&self.indices, store)?;
            self.checked.get_or_init(|| ());
        }
        Ok(instance.get_func(store, self.function))
    }
}

impl Batch {
    fn find(pre: &InstancePre<State>, is_packed: bool) -> wasmtime::Result<Self> {
        const FUNCTION: &str = "handle-batch";
        Ok(match is_packed {
            true => {
                let indices = packed_batch_handler::GuestIndices::new(pre)?;
                Self::Packed(Entry::find(pre, indices, PACKED_BATCH_HANDLER, FUNCTION)?)
            }
            false => {
                let indices = batch_handler::GuestIndices::new(pre)?;
                Self::Listed(Entry::find(pre, indices, BATCH_HANDLER, FUNCTION)?)
            }
        })
    }

    fn bind(&self, store: &mut Store<State>, instance: &Instance) -> wasmtime::Result<Option<HandleBatch>> {
        Ok(match self {
            Self::Listed(entry) => {
                let check = |indices: &batch_handler::GuestIndices, store: &mut _| {
                    indices.load(store, instance).map(drop).context(BATCH_HANDLER)
                };
                entry.bind(store, instance, check)?.map(HandleBatch::Listed)
            }
            Self::Packed(entry) => {
                let check = |indices: &packed_batch_handler::GuestIndices, store: &mut _| {
                    indices.load(store, instance).map(drop).context(PACKED_BATCH_HANDLER)
                };
                entry.bind(store, instance, check)?.map(HandleBatch::Packed)
            }
        })
    }
}

/// Calls a function with what it takes, for what it returns.
///
/// # Safety
/// The function must be of this type: that is not checked again.
#[expect(unsafe_code, reason = "the types of a function are checked in the first instance of a component, not in each")]
async unsafe fn call<P, R>(function: Func, store: &mut Store<State>, values: P) -> wasmtime::Result<R>
where
    P: ComponentNamedList + Lower + Send + Sync,
    (R,): ComponentNamedList + Lift + Send + Sync + 'static,
{
    // SAFETY: as for this function.
    let function = unsafe { TypedFunc::<P, (R,)>::new_unchecked(function) };
    let (answer,) = function.call_async(store, values).await?;
    Ok(answer)
}

impl Exports {
    /// Looks for them in a component that says that it has this interface.
    ///
    /// # Errors
    /// The engine's, where an interface lacks a function.
    pub(super) fn find(pre: &InstancePre<State>, interface: &Interface) -> wasmtime::Result<Self> {
        let has = |name| has_export(&interface.exports, name);
        let is_packed = has(PACKED_BATCH_HANDLER);
        Self::of(pre, (is_packed || has(BATCH_HANDLER)).then_some(is_packed), has(LIFECYCLE))
    }

    /// Looks for the same ones in the same component on another engine.
    ///
    /// # Errors
    /// Those of [`find`](Self::find), which there are none of.
    pub(super) fn again(&self, pre: &InstancePre<State>) -> wasmtime::Result<Self> {
        let is_packed = self.batch.as_ref().map(|batch| matches!(batch, Batch::Packed(_)));
        Self::of(pre, is_packed, self.lifecycle.is_some())
    }

    /// Those of a component that takes batches in this form, where it takes any.
    fn of(pre: &InstancePre<State>, is_packed: Option<bool>, has_lifecycle: bool) -> wasmtime::Result<Self> {
        Ok(Self {
            handler: Entry::find(pre, handler::GuestIndices::new(pre)?, HANDLER, "handle")?,
            batch: is_packed.map(|is_packed| Batch::find(pre, is_packed)).transpose()?,
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
            let check = |indices: &handler::GuestIndices, store: &mut _| indices.load(store, instance).map(drop);
            *handler = self.handler.bind(store, instance, check)?.map(Handle);
        }
        if let Some(entry) = &self.batch
            && batch.is_none()
            && needs(Export::HandleBatch)
        {
            *batch = entry.bind(store, instance)?;
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
        match (export, events, self.handler, self.batch) {
            (Export::Handle, [event], Some(handler), _) => {
                Ok(Answers::from_buf([handle(handler, store, event).await?]))
            }
            (Export::HandleBatch, .., Some(HandleBatch::Listed(batch))) => {
                Ok(handle_batch(batch, store, events).await?.into())
            }
            (Export::HandleBatch, .., Some(HandleBatch::Packed(batch))) => {
                Ok(handle_packed(batch, store, events).await?.into())
            }
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

#[expect(unsafe_code, reason = "see `call`")]
async fn handle(handler: Handle, store: &mut Store<State>, event: &Event) -> wasmtime::Result<Answer> {
    let spelled_out = convert::spelled_out(event);
    let attributes = convert::attributes(event, &spelled_out);
    // SAFETY: the generated bindings found that it takes an event and gives an answer.
    unsafe { call(handler.0, store, (convert::guest_event(event, &attributes),)) }.await
}

#[expect(unsafe_code, reason = "see `call`")]
async fn handle_batch(batch: Func, store: &mut Store<State>, events: &[Arc<Event>]) -> wasmtime::Result<Vec<Answer>> {
    let spelled_out: Vec<_> = events.iter().map(|event| convert::spelled_out(event)).collect();
    let attributes: Vec<_> =
        events.iter().zip(&spelled_out).map(|(event, spelled_out)| convert::attributes(event, spelled_out)).collect();
    let events: Vec<_> =
        events.iter().zip(&attributes).map(|(event, attributes)| convert::guest_event(event, attributes)).collect();
    // SAFETY: the generated bindings found that it takes a list of events and gives a list of answers.
    unsafe { call::<(&[types::Event<'_>],), _>(batch, store, (&events,)) }.await
}

#[expect(unsafe_code, reason = "see `call`")]
async fn handle_packed(batch: Func, store: &mut Store<State>, events: &[Arc<Event>]) -> wasmtime::Result<Vec<Answer>> {
    let packed = convert::packed(events).ok_or_else(|| wasmtime::Error::msg("a string has more than 4 GiB"))?;
    let Packed { events, attributes, text } = &packed;
    // SAFETY: the generated bindings found that it takes these three and gives a list of answers.
    unsafe { call::<(&[PackedEvent<'_>], &[(u32, u32)], &str), _>(batch, store, (events, attributes, text)) }.await
}
