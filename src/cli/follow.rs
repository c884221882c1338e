//! Plugins as subscribers: what a folder's plugins ask for is bound to the broker, and follows every change.
//!
//! The subscriptions of a plugin are what its manifest says: one that a new version no longer asks for is removed with
//! its open deliveries. A plugin whose file is gone keeps its subscriptions, and their deliveries wait for it.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use crate::broker::Broker;
use crate::error::{Error, Result};
use crate::handler::Handler;
use crate::host::manifest::Manifest;
use crate::host::{Change, Folder, Host};
use crate::subscription::HandlerRef;

/// Brings what a folder holds into force: versions in the host, subscriptions in the broker.
pub struct Follower {
    host: Host,
    folder: Folder,
    broker: Broker,
    /// By plugin, what happened to it and could not be told to the broker yet.
    unbound: BTreeMap<Arc<str>, Change>,
    /// Why the folder could not be read the last time, if it could not.
    trouble: Option<String>,
}

impl Follower {
    /// A follower of the folder, whose plugins are run by this host for this broker.
    #[must_use]
    pub fn new(host: Host, folder: Folder, broker: Broker) -> Self {
        Self { host, folder, broker, unbound: BTreeMap::new(), trouble: None }
    }

    /// Binds what the folder holds now.
    ///
    /// # Errors
    /// When the folder cannot be read. What the broker's store refuses is tried again at the next look.
    pub async fn look(&mut self) -> Result<()> {
        match self.folder.scan().await {
            Ok(changes) => {
                self.unbound.extend(changes.into_iter().map(|change| (Arc::clone(change.name()), change)));
                let trouble = self.bind_all().await;
                let refused =
                    |words: &String| Error::store("broker", "bind the subscriptions of plugins", words.clone());
                self.folder.answer(|| trouble.as_ref().map_or(Ok(()), |words| Err(refused(words))));
                Ok(())
            }
            Err(error) => {
                self.folder.answer(|| Err(Error::plugin("folder", error.to_string())));
                Err(error)
            }
        }
    }

    /// Follows the folder until `shutdown` completes.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = self.folder.changed() => {}
                () = &mut shutdown => return,
            }
            // Not to be cut off: a change is told once.
            let trouble = self.look().await.err().map(|error| error.to_string());
            match &trouble {
                Some(words) if self.trouble != trouble => {
                    tracing::error!(error = words, "all plugins stay as they are")
                }
                None if self.trouble.is_some() => tracing::info!("the folder of plugins can be read again"),
                _ => {}
            }
            self.trouble = trouble;
        }
    }

    /// Tells the broker what happened. What its store refuses stays to be told, and why is returned.
    async fn bind_all(&mut self) -> Option<String> {
        let mut trouble = None;
        // What is removed goes first, so that its names are free for what comes.
        let (gone, come): (Vec<_>, Vec<_>) = std::mem::take(&mut self.unbound)
            .into_values()
            .partition(|change| matches!(change, Change::Removed { .. }));
        for change in gone.into_iter().chain(come) {
            if let Err(error) = self.bind(&change).await {
                tracing::error!(plugin = %change.name(), %error, "a plugin's subscriptions are not in force yet");
                trouble = Some(error.to_string());
                self.unbound.insert(Arc::clone(change.name()), change);
            }
        }
        trouble
    }

    async fn bind(&self, change: &Change) -> Result<()> {
        match change {
            Change::Loaded { name, manifest, handler } => bind(name, manifest, handler, &self.broker).await,
            Change::Removed { name } => {
                for subscription in subscriptions_of(name, &self.broker) {
                    if let Err(error) = self.broker.unbind(&subscription).await {
                        tracing::error!(plugin = %name, %subscription, %error, "leased deliveries wait for their lease to end");
                    }
                }
                // Not before nobody is given deliveries for it: they would end as host faults.
                self.host.remove(name);
                Ok(())
            }
        }
    }
}

async fn bind(plugin: &str, manifest: &Manifest, handler: &Arc<dyn Handler>, broker: &Broker) -> Result<()> {
    let wanted = manifest.subscriptions();
    for name in subscriptions_of(plugin, broker) {
        if wanted.iter().all(|subscription| subscription.name != name) {
            tracing::warn!(plugin, subscription = %name, "removed: this version of the plugin does not ask for it");
            broker.unsubscribe(&name).await?;
        }
    }
    for subscription in wanted {
        tracing::info!(plugin, subscription = %subscription.name, pattern = %subscription.pattern, "subscribed");
        broker.subscribe(subscription, Arc::clone(handler)).await?;
    }
    Ok(())
}

/// The subscriptions that call the plugin, as the broker knows them.
fn subscriptions_of(plugin: &str, broker: &Broker) -> Vec<Arc<str>> {
    let calls = |handler: &HandlerRef| matches!(handler, HandlerRef::Plugin(name) if &**name == plugin);
    let known = broker.subscriptions().into_iter().map(|status| status.subscription);
    known.filter(|subscription| calls(&subscription.handler)).map(|subscription| subscription.name).collect()
}
