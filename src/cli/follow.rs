//! Plugins as subscribers: what a folder's plugins ask for is bound to the broker, and follows every change.
//!
//! The subscriptions of a plugin are what its manifest says: one that a new version no longer asks for is removed with
//! its open deliveries. A plugin whose file is gone keeps its subscriptions, and their deliveries wait for it.

use std::sync::Arc;

use tokio::sync::watch;

use crate::broker::Broker;
use crate::error::Result;
use crate::handler::Handler;
use crate::host::manifest::Manifest;
use crate::host::{Change, Folder};
use crate::subscription::HandlerRef;

/// Binds what the folder holds now.
///
/// # Errors
/// When the folder cannot be read.
pub(super) async fn load(folder: &mut Folder, broker: &Broker) -> Result<()> {
    for change in folder.scan().await? {
        apply(change, broker).await;
    }
    Ok(())
}

/// Follows the folder until `stop` is raised.
pub(super) async fn follow(mut folder: Folder, broker: Broker, mut stop: watch::Receiver<bool>) {
    loop {
        tokio::select! {
            () = folder.changed() => {}
            _ = stop.wait_for(|&raised| raised) => return,
        }
        // Not to be cut off: a change is told once.
        if let Err(error) = load(&mut folder, &broker).await {
            tracing::error!(%error, "the folder of plugins cannot be read");
        }
    }
}

async fn apply(change: Change, broker: &Broker) {
    match change {
        Change::Loaded { name, manifest, handler } => {
            if let Err(error) = bind(&name, &manifest, &handler, broker).await {
                tracing::error!(plugin = %name, %error, "a plugin's subscriptions cannot be bound");
            }
        }
        Change::Removed { name } => {
            for subscription in subscriptions_of(&name, broker) {
                if let Err(error) = broker.unbind(&subscription).await {
                    tracing::error!(plugin = %name, %subscription, %error, "leased deliveries wait for their lease to end");
                }
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
