//! Whether what is behind the edge is there yet, and why not.
//!
//! The socket is bound before the store is opened, so that a probe sees a process that lives and is not ready, and a
//! taken port is noticed before anything is touched.

use std::collections::BTreeSet;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use parking_lot::{Mutex, MutexGuard};

use super::problem::Problem;
use crate::broker::Broker;
use crate::feed::Feed;
use crate::host::{Host, Reloader};

/// What the edge hands requests to.
#[derive(Clone)]
pub struct Services {
    /// Takes events in and knows what became of them.
    pub broker: Broker,
    /// Shows the log as it grows.
    pub feed: Feed,
    /// Runs plugins, where there are any.
    pub host: Option<Host>,
    /// Asks whoever follows the plugins' folder to look at it now, where there is one.
    pub reloader: Option<Reloader>,
}

/// A door that is opened once everything behind it is ready, and closed when it stops. Cheap to clone.
#[derive(Clone, Default)]
pub struct Gate {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    services: ArcSwapOption<Services>,
    /// Why not everything is ready, one entry per cause.
    waiting: Mutex<BTreeSet<&'static str>>,
}

impl Gate {
    /// A closed door, which waits for each of `causes`.
    #[must_use]
    pub fn waiting_for(causes: impl IntoIterator<Item = &'static str>) -> Self {
        let gate = Self::default();
        gate.waiting().extend(causes);
        gate
    }

    /// Lets requests through to `services`. Ready is only who waits for nothing more.
    pub fn open(&self, services: Services) {
        self.inner.services.store(Some(Arc::new(services)));
    }

    /// `cause` is waited for no more.
    pub fn done(&self, cause: &'static str) {
        self.waiting().remove(cause);
    }

    /// Not ready any more, because of `cause`. Requests still pass.
    pub fn wait(&self, cause: &'static str) {
        self.waiting().insert(cause);
    }

    /// Why not everything is ready; empty when it is.
    #[must_use]
    pub fn reasons(&self) -> Vec<&'static str> {
        self.waiting().iter().copied().collect()
    }

    /// What is behind the door.
    ///
    /// # Errors
    /// 503 with the reasons while it is closed.
    pub(super) fn services(&self) -> Result<Arc<Services>, Problem> {
        self.inner.services.load_full().ok_or_else(|| {
            Problem::unavailable("not_running", format!("tidegate is starting: {}", self.reasons().join(", ")))
        })
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeSet<&'static str>> {
        self.inner.waiting.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_who_waits_for_nothing() {
        let gate = Gate::waiting_for(["the store opens", "plugins load"]);
        assert_eq!(gate.reasons(), ["plugins load", "the store opens"]);
        gate.done("plugins load");
        gate.done("the store opens");
        assert!(gate.reasons().is_empty());
        assert!(gate.services().is_err());
        gate.wait("stopping");
        assert_eq!(gate.reasons(), ["stopping"]);
    }
}
