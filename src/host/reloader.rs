//! Reloading on demand: a handle for those who know plugins by name and not where they come from.
//!
//! Who follows the folder answers. What is done is what a change in the folder brings about, with all files read anew.

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use super::registry::{Host, PluginStatus};
use crate::error::{Error, Result};

/// Where the follower answers.
pub(super) type Request = oneshot::Sender<Result<()>>;

/// Asks whoever follows the folder of plugins to look at it now. Cheap to clone.
#[derive(Clone)]
pub struct Reloader {
    host: Host,
    requests: mpsc::Sender<Request>,
}

/// What a reload on demand came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reloaded {
    /// The plugin as it is now.
    #[serde(flatten)]
    pub plugin: PluginStatus,
    /// Whether another version is active than before, or none any more.
    pub changed: bool,
}

impl Reloader {
    pub(super) fn new(host: Host, requests: mpsc::Sender<Request>) -> Self {
        Self { host, requests }
    }

    /// Reads the folder anew and waits until what came of it is in force.
    ///
    /// # Errors
    /// [`Error::Plugin`] when the folder cannot be read, [`Error::Store`] when subscriptions are not in force yet, and
    /// [`Error::Stopped`] when nobody follows the folder any more.
    pub async fn reload_all(&self) -> Result<()> {
        let (answer, answered) = oneshot::channel();
        let gone = || Error::Stopped("the follower of the plugins' folder");
        self.requests.send(answer).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// The same, for the sake of one plugin.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a name that neither a plugin nor a refused candidate has, [`Error::Plugin`] when its
    /// candidate is refused, and as [`reload_all`](Self::reload_all).
    pub async fn reload(&self, name: &str) -> Result<Reloaded> {
        let before = self.host.status(name);
        self.reload_all().await?;
        let plugin = match (self.host.status(name), &before) {
            (Some(PluginStatus { refused: Some(refusal), .. }), _) => return Err(Error::plugin(name, refusal.error)),
            (Some(plugin), _) => plugin,
            (None, Some(before)) => PluginStatus { active: None, refused: None, ..before.clone() },
            (None, None) => return Err(Error::not_found("plugin", name)),
        };
        let changed = before.and_then(|before| before.digest()) != plugin.digest();
        Ok(Reloaded { plugin, changed })
    }
}
