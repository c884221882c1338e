//! The folder of plugins on a real file system, and what a reload does to events that flow meanwhile.
//!
//! A manifest of another wording makes another version of the same guest. Where time matters to the follower and not to
//! the file system it is paused: the follower then looks again as soon as there is nothing else to do.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use jiff::Timestamp;
use serde_json::json;
use tidegate::broker::Options as BrokerOptions;
use tidegate::cli::follow::Follower;
use tidegate::host::component::embed_manifest;
use tidegate::host::{Change, Folder, Host, Options, PluginStatus, Refusal, Reloader};
use tidegate::provider::memory::{self, MemoryProvider};
use tidegate::provider::sqlite::{self, SqliteProvider};
use tidegate::provider::{Expect, Provider};
use tidegate::{Broker, Error, Event, Metrics, Payload, Source, Status, Verdict};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::support::guests::{FAULTS, faults, guest, host};

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// A folder and a host that serves it.
struct Place {
    directory: tempfile::TempDir,
    host: Host,
    folder: Folder,
}

impl Place {
    fn new() -> Self {
        Self::of(host())
    }

    fn of(host: Host) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let folder = Folder::open(host.clone(), directory.path()).unwrap();
        Self { directory, host, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// What one look changed: `+name` for loaded and `-name` for removed.
    async fn look(&mut self) -> Vec<String> {
        let changes = self.folder.scan().await.unwrap();
        let shown = changes.iter().map(|change| match change {
            Change::Loaded { name, .. } => format!("+{name}"),
            Change::Removed { name } => {
                self.host.remove(name);
                format!("-{name}")
            }
        });
        shown.collect()
    }

    /// Looks when the folder says so, until there is a refusal; returns it and what changed meanwhile.
    async fn refused(&mut self) -> (Refusal, Vec<String>) {
        let mut changes = Vec::new();
        for _ in 0..100 {
            changes.extend(self.look().await);
            if let Some(refusal) = refusals(&self.host).into_iter().next() {
                return (refusal, changes);
            }
            self.folder.changed().await;
        }
        panic!("nothing was refused: {:?}", self.host.plugins());
    }

    fn digest(&self) -> Option<Arc<str>> {
        self.host.active("faults").map(|active| Arc::clone(active.digest()))
    }
}

fn refusals(host: &Host) -> Vec<Refusal> {
    host.plugins().into_iter().filter_map(|plugin| plugin.refused).collect()
}

/// A guest that needs no grants, under this name, with this much added to its manifest.
fn plain(name: &str, more: &str) -> Vec<u8> {
    let manifest = format!("name = \"{name}\"\nversion = \"1.0.0\"\n{more}");
    embed_manifest(&guest("audit-trail"), &manifest).unwrap()
}

/// Invariant 7: a reload that fails leaves the old version serving.
#[tokio::test(start_paused = true)]
async fn a_bad_candidate_leaves_the_old_version_serving_and_is_reported_once() {
    let mut place = Place::new();
    let path = place.put("a.wasm", &faults(""));
    place.put("notes.txt", b"no plugin");
    assert_eq!(place.look().await, ["+faults"]);
    let good = place.digest();

    place.put("a.wasm", &faults("")[..1000]);
    let (refused, changes) = place.refused().await;
    assert!(changes.is_empty(), "{changes:?}");
    assert_eq!(refused.origin, path.to_string_lossy());
    assert_eq!(refused.plugin.as_deref(), Some("faults"), "its file serves that plugin");
    assert!(refused.error.contains("is cut short") && refused.digest.is_some(), "{refused:?}");
    assert_eq!(place.digest(), good);
    assert!(place.look().await.is_empty());
    assert_eq!(refusals(&place.host), [refused], "not tried again");

    place.put("a.wasm", &faults("# better\n"));
    assert_eq!(place.look().await, ["+faults"]);
    assert_ne!(place.digest(), good);
    assert!(refusals(&place.host).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_half_written_file_is_not_refused_while_it_grows() {
    let mut place = Place::new();
    place.put("a.wasm", &faults(""));
    assert_eq!(place.look().await, ["+faults"]);
    let (old, new) = (place.digest(), faults("# longer\n"));
    for length in [0, 4, 1000, new.len() / 2, new.len() - 1] {
        place.put("a.wasm", &new[..length]);
        assert!(place.look().await.is_empty() && place.look().await.is_empty());
        assert_eq!((place.digest(), refusals(&place.host)), (old.clone(), Vec::new()), "{length} bytes");
    }
    place.put("a.wasm", &new);
    assert_eq!(place.look().await, ["+faults"]);
    assert!(refusals(&place.host).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_plugin_goes_with_its_file_and_survives_its_renaming() {
    let mut place = Place::new();
    let path = place.put("a.wasm", &faults(""));
    assert_eq!(place.look().await, ["+faults"]);
    let version = place.host.active("faults").unwrap();
    std::fs::rename(&path, place.path("b.wasm")).unwrap();
    assert!(place.look().await.is_empty(), "the same plugin in another file");
    std::fs::File::open(place.path("b.wasm")).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert!(place.look().await.is_empty(), "touched and not changed");
    assert!(Arc::ptr_eq(&version, &place.host.active("faults").unwrap()), "nothing was built again");
    std::fs::remove_file(place.path("b.wasm")).unwrap();
    assert_eq!(place.look().await, ["-faults"]);
    assert!(place.host.active("faults").is_none() && place.host.plugins().is_empty());
}

#[tokio::test(start_paused = true)]
async fn two_files_of_one_name_do_not_take_turns() {
    let mut place = Place::new();
    let first = place.put("a.wasm", &faults(""));
    place.put("b.wasm", &faults("# the other\n"));
    assert_eq!(place.look().await, ["+faults"]);
    let refused = place.host.status("faults").unwrap().refused.unwrap();
    assert!(refused.error.contains("the name faults") && refused.error.contains("a.wasm"), "{refused:?}");
    assert!(refused.origin.ends_with("b.wasm"), "{refused:?}");
    assert!(place.look().await.is_empty());
    std::fs::remove_file(first).unwrap();
    assert_eq!(place.look().await, ["+faults"]);
    assert!(refusals(&place.host).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_subscription_of_another_plugin_is_not_taken_over() {
    let mut place = Place::new();
    let subscribe = "[[subscribe]]\npattern = \"shop.**\"\nname = \"shop\"\n";
    place.put("a.wasm", &plain("one", subscribe));
    assert_eq!(place.look().await, ["+one"]);
    place.put("b.wasm", &plain("two", subscribe));
    assert!(place.look().await.is_empty());
    let refused = place.host.status("two").unwrap().refused.unwrap();
    assert!(refused.error.contains("a subscription called shop"), "{refused:?}");
    place.put("a.wasm", &plain("one", ""));
    assert_eq!(place.look().await, ["+one", "+two"], "the first gave it up");
}

#[tokio::test(start_paused = true)]
async fn files_that_are_no_candidates_are_passed_over() {
    let mut place = Place::new();
    for name in [".hidden.wasm", "~a.wasm", "a.wasm~", "a.wasm.part", "a.wasm.tmp", ".a.wasm.swp", "A.WASM"] {
        place.put(name, &faults(""));
    }
    std::fs::create_dir(place.path("deep.wasm")).unwrap();
    place.put("deep.wasm/b.wasm", &faults(""));
    assert!(place.look().await.is_empty());
    assert!(place.host.plugins().is_empty());
    assert!(std::process::Command::new("mkfifo").arg(place.path("pipe.wasm")).status().unwrap().success());
    let (refused, _) = place.refused().await;
    assert!(refused.error.contains("is not a regular file"), "{refused:?}");
}

/// What `cp` over a file of the same size within one tick of the file system's clock looks like.
#[tokio::test(start_paused = true)]
async fn a_change_that_leaves_size_and_time_is_noticed() {
    let mut place = Place::new();
    let path = place.put("a.wasm", &faults("# 1\n"));
    let modified = std::fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(place.look().await, ["+faults"]);
    place.put("a.wasm", &faults("# 2\n"));
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    assert_eq!(place.look().await, ["+faults"]);
}

/// The way in which a Kubernetes config map is replaced: the links stay, and what they lead through is switched.
#[tokio::test(start_paused = true)]
async fn a_switched_link_is_a_change_and_a_dangling_one_leaves_the_old_version() {
    let mut place = Place::new();
    for (folder, more) in [("..first", ""), ("..second", "# second\n")] {
        std::fs::create_dir(place.path(folder)).unwrap();
        place.put(&format!("{folder}/a.wasm"), &faults(more));
    }
    symlink("..first", place.path("..data")).unwrap();
    symlink("..data/a.wasm", place.path("a.wasm")).unwrap();
    assert_eq!(place.look().await, ["+faults"]);
    let first = place.digest();
    symlink("..second", place.path("..data_tmp")).unwrap();
    std::fs::rename(place.path("..data_tmp"), place.path("..data")).unwrap();
    assert_eq!(place.look().await, ["+faults"]);
    let second = place.digest();
    assert_ne!(first, second);

    std::fs::remove_dir_all(place.path("..second")).unwrap();
    let (refused, changes) = place.refused().await;
    assert!(refused.error.contains("cannot be read") && changes.is_empty(), "{refused:?} {changes:?}");
    assert_eq!((refused.plugin.as_deref(), refused.digest), (Some("faults"), None));
    assert_eq!(place.digest(), second);
    std::fs::remove_file(place.path("..data")).unwrap();
    symlink("..first", place.path("..data")).unwrap();
    assert_eq!(place.look().await, ["+faults"]);
    assert!(place.digest() == first && refusals(&place.host).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_file_that_may_not_be_read_is_refused_until_it_can() {
    let mut place = Place::new();
    let path = place.put("a.wasm", &faults(""));
    assert_eq!(place.look().await, ["+faults"]);
    // A link to itself cannot be read by root either.
    std::fs::remove_file(&path).unwrap();
    symlink("a.wasm", &path).unwrap();
    let (refused, changes) = place.refused().await;
    assert!(refused.error.contains("cannot be read") && changes.is_empty(), "{refused:?} {changes:?}");
    std::fs::remove_file(&path).unwrap();
    place.put("a.wasm", &faults(""));
    assert!(place.look().await.is_empty(), "the version that serves anyway");
    assert!(refusals(&place.host).is_empty());

    // For everybody but root the mode counts too.
    let locked = place.put("b.wasm", &plain("locked", ""));
    let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    std::fs::set_permissions(&locked, mode(0o000)).unwrap();
    if std::fs::File::open(&locked).is_err() {
        let (refused, _) = place.refused().await;
        assert!(refused.error.contains("ermission denied"), "{refused:?}");
        std::fs::set_permissions(&locked, mode(0o644)).unwrap();
    }
    assert_eq!(place.look().await, ["+locked"]);
}

#[tokio::test(start_paused = true)]
async fn a_huge_file_is_refused_without_being_read() {
    let options = Options { max_component: ByteSize::mib(1), ..Options::default() };
    let mut place = Place::of(Host::new(options, None).unwrap());
    std::fs::File::create(place.path("huge.wasm")).unwrap().set_len(1 << 42).unwrap();
    place.put("one.wasm", &plain("one", ""));
    let (refused, changes) = place.refused().await;
    assert!(refused.error.contains("1.0 MiB") && refused.error.contains("host.max_component"), "{refused:?}");
    assert_eq!((changes, refused.digest), (vec!["+one".to_owned()], None));
}

#[tokio::test(start_paused = true)]
async fn names_that_are_not_utf_8_are_served_and_shown() {
    let mut place = Place::new();
    let name = |bytes: &'static [u8]| place.directory.path().join(OsStr::from_bytes(bytes));
    std::fs::write(name(b"\xff.wasm"), faults("")).unwrap();
    std::fs::write(name(b"\xfe.wasm"), "no component").unwrap();
    let (refused, changes) = place.refused().await;
    assert_eq!(changes, ["+faults"]);
    assert!(refused.origin.ends_with("\\xfe.wasm"), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn many_files_are_loaded_in_one_look_each_with_its_own_end() {
    let mut place = Place::new();
    for n in 0..6 {
        place.put(&format!("{n}.wasm"), &plain(&format!("plugin-{n}"), ""));
    }
    place.put("2.wasm", &plain("plugin-2", "[capabilities]\nkv = [\"a\"]\n"));
    assert_eq!(place.look().await, ["+plugin-0", "+plugin-1", "+plugin-3", "+plugin-4", "+plugin-5"]);
    let refused = place.host.status("plugin-2").unwrap().refused.unwrap();
    assert!(refused.error.contains("[plugins.plugin-2.grants]"), "{refused:?}");
}

#[tokio::test]
async fn a_change_of_the_folder_is_noticed_without_asking() {
    let mut place = Place::new();
    place.folder.changed().await;
    assert!(place.look().await.is_empty());
    place.put("a.wasm", &faults(""));
    place.folder.changed().await;
    assert_eq!(place.look().await, ["+faults"]);
    std::fs::remove_file(place.path("a.wasm")).unwrap();
    place.folder.changed().await;
    assert_eq!(place.look().await, ["-faults"]);
}

#[tokio::test]
async fn a_folder_that_is_removed_and_made_again_is_followed_again() {
    let missing = Folder::open(host(), Path::new("/nonexistent/plugins")).map(|_| ()).unwrap_err().to_string();
    assert!(missing.contains("plugins: must be an existing folder"), "{missing}");
    let parent = tempfile::tempdir().unwrap();
    let (path, host) = (parent.path().join("plugins"), host());
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("a.wasm"), faults("")).unwrap();
    let folder = Folder::open(host.clone(), &path).unwrap();
    let mut place = Place { directory: parent, host, folder };
    assert_eq!(place.look().await, ["+faults"]);
    let old = place.digest();

    std::fs::remove_dir_all(&path).unwrap();
    place.folder.changed().await;
    let error = place.folder.scan().await.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("plugins: cannot be read"), "{error}");
    assert_eq!(place.digest(), old, "what is not known to be gone stays");

    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("a.wasm"), faults("# again\n")).unwrap();
    // Nothing watches yet: the poll notices.
    place.folder.changed().await;
    assert_eq!(place.look().await, ["+faults"]);
    std::fs::write(path.join("b.wasm"), plain("watched", "")).unwrap();
    let began = Instant::now();
    place.folder.changed().await;
    assert!(began.elapsed() < Duration::from_secs(4), "it is watched again: {:?}", began.elapsed());
    assert_eq!(place.look().await, ["+watched"]);
}

/// A folder that is a link to the release in force: what it led to before sends the only notifications.
#[tokio::test(start_paused = true)]
async fn a_folder_that_is_a_link_can_be_switched() {
    let parent = tempfile::tempdir().unwrap();
    for release in ["1", "2"] {
        std::fs::create_dir(parent.path().join(release)).unwrap();
        std::fs::write(parent.path().join(release).join("a.wasm"), faults(&format!("# {release}\n"))).unwrap();
    }
    let current = parent.path().join("current");
    symlink("1", &current).unwrap();
    let host = host();
    let folder = Folder::open(host.clone(), &current).unwrap();
    let mut place = Place { directory: parent, host, folder };
    assert_eq!(place.look().await, ["+faults"]);
    symlink("2", place.path("next")).unwrap();
    std::fs::rename(place.path("next"), &current).unwrap();
    place.folder.changed().await;
    assert_eq!(place.look().await, ["+faults"]);
}

/// A broker that handles events with the plugins of a folder, as a server does.
struct Rig {
    broker: Broker,
    host: Host,
    reloader: Reloader,
    provider: Arc<dyn Provider>,
    directory: tempfile::TempDir,
    stops: Vec<oneshot::Sender<()>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Rig {
    async fn over(provider: Arc<dyn Provider>, files: &[(&str, Vec<u8>)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(directory.path().join(name), bytes).unwrap();
        }
        let options = BrokerOptions { instance_id: "test".into(), ..BrokerOptions::default() };
        let (broker, service) = Broker::open(Arc::clone(&provider), options, Metrics::default()).await.unwrap();
        let host = host();
        let folder = Folder::open(host.clone(), directory.path()).unwrap();
        let reloader = folder.reloader();
        let mut follower = Follower::new(host.clone(), folder, broker.clone());
        follower.look().await.unwrap();
        let (stop_service, service_stops) = oneshot::channel::<()>();
        let (stop_follower, follower_stops) = oneshot::channel::<()>();
        let tasks = vec![
            tokio::spawn(async move { service.run(async { drop(service_stops.await) }).await.unwrap() }),
            tokio::spawn(follower.run(async { drop(follower_stops.await) })),
        ];
        let stops = vec![stop_follower, stop_service];
        Self { broker, host, reloader, provider, directory, stops, tasks }
    }

    async fn over_memory(files: &[(&str, Vec<u8>)]) -> Self {
        Self::over(Arc::new(MemoryProvider::open(roomy()).unwrap()), files).await
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts a file in place in one step.
    fn replace(&self, name: &str, bytes: &[u8]) {
        let beside = self.path(".beside");
        std::fs::write(&beside, bytes).unwrap();
        std::fs::rename(beside, self.path(name)).unwrap();
    }

    async fn publish(&self, event_type: &str, id: &str) {
        self.broker.publish(event(event_type, id, &json!({"fault": "none"}))).await.unwrap();
    }

    /// The delivery of the event to the only subscription that it matched.
    async fn delivery(&self, id: &str) -> tidegate::Delivery {
        let [delivery]: [_; 1] = self.broker.event(id).await.unwrap().deliveries.try_into().unwrap();
        delivery
    }

    async fn close(self) {
        drop(self.stops);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.provider.close().await.unwrap();
    }
}

/// Room for all that a test publishes.
fn roomy() -> memory::Options {
    memory::Options { max_events: 100_000, ..memory::Options::default() }
}

fn event(event_type: &str, id: &str, payload: &serde_json::Value) -> Event {
    let payload = Payload::json(payload).unwrap();
    Event { id: id.parse().unwrap(), ..Event::new(Source::System, event_type.parse().unwrap(), payload) }
}

/// Polls until `met`.
async fn until(what: &str, mut met: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !met().await {
        assert!(began.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn subscribed(pattern: &str, name: &str) -> String {
    format!("[[subscribe]]\npattern = \"{pattern}\"\nname = \"{name}\"\n")
}

/// A manifest's changes go the way of the code's: patterns, subscriptions that come and go, and the policy.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_version_subscribes_to_takes_effect_with_it() {
    let first = subscribed("faults.a.*", "stays") + &subscribed("faults.b.*", "goes");
    let rig = Rig::over_memory(&[("a.wasm", faults(&first))]).await;
    let retry = "[retry]\nmax_retries = 0\n";
    let second = subscribed("faults.c.*", "stays") + &subscribed("faults.d.*", "comes") + retry;
    rig.replace("a.wasm", &faults(&second));
    let reloaded = rig.reloader.reload("faults").await;
    assert!(reloaded.is_ok(), "{reloaded:?}");
    let status = rig.broker.subscriptions();
    let rows: Vec<_> =
        status.iter().map(|one| (&*one.subscription.name, one.subscription.pattern.as_str(), one.bound)).collect();
    assert_eq!(rows, [("comes", "faults.d.*", true), ("stays", "faults.c.*", true)]);

    for (event_type, id, matched) in [("faults.a.x", "a", 0), ("faults.b.x", "b", 0), ("faults.c.x", "c", 1)] {
        rig.publish(event_type, id).await;
        assert_eq!(rig.broker.event(id).await.unwrap().deliveries.len(), matched, "{event_type}");
    }
    let failing = event("faults.c.x", "f", &json!({"fault": "retry"}));
    let answer = rig.broker.publish_sync(failing, PATIENCE).await.unwrap();
    let delivery = &answer.detail.deliveries[0];
    assert_eq!((delivery.status, delivery.attempts.len()), (Status::Failed, 1), "the new policy allows no retry");
    rig.close().await;
}

/// A plugin that is gone claims nothing more; its deliveries wait, unpunished, until it is back.
#[tokio::test(flavor = "multi_thread")]
async fn the_deliveries_of_a_removed_plugin_wait_for_its_return() {
    let bytes = faults(&subscribed("faults.**", "faults"));
    let rig = Rig::over_memory(&[("a.wasm", bytes.clone())]).await;
    std::fs::remove_file(rig.path("a.wasm")).unwrap();
    until("the plugin goes", async || rig.host.active("faults").is_none()).await;
    for n in 0..20 {
        rig.publish("faults.tests.create", &format!("e-{n}")).await;
    }
    assert!(!rig.broker.subscription("faults").unwrap().bound);
    assert_eq!(rig.delivery("e-0").await.status, Status::Pending);
    rig.replace("a.wasm", &bytes);
    for n in 0..20 {
        let id = format!("e-{n}");
        until("it is handled", async || rig.delivery(&id).await.status == Status::Completed).await;
        assert_eq!(rig.delivery(&id).await.attempts.len(), 1, "nothing was tried in vain");
    }
    rig.close().await;
}

/// A version that serves and whose subscriptions the store refuses is bound once the store does not.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_store_refuses_to_bind_is_tried_again() {
    let rig = Rig::over_memory(&[]).await;
    // A document that no broker can read stands in the way.
    let (collection, name) = ("subscriptions", "faults");
    rig.provider.put_document(collection, name, "damaged".into(), Expect::Absent, None).await.unwrap();
    rig.replace("a.wasm", &faults(&subscribed("faults.**", name)));
    let refused = rig.reloader.reload("faults").await.unwrap_err();
    assert!(matches!(refused, Error::Store { .. }), "{refused}");
    assert!(rig.host.active("faults").is_some() && rig.broker.subscription(name).is_err());
    rig.provider.delete_document(collection, name, Expect::Any).await.unwrap();
    rig.reloader.reload("faults").await.unwrap();
    rig.publish("faults.tests.create", "e-1").await;
    until("it is handled", async || rig.delivery("e-1").await.status == Status::Completed).await;
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_on_demand_says_what_came_of_it() {
    let rig = Rig::over_memory(&[("a.wasm", faults(""))]).await;
    let unknown = rig.reloader.reload("nobody").await.unwrap_err();
    assert!(matches!(unknown, Error::NotFound { what: "plugin", .. }), "{unknown}");
    let same = rig.reloader.reload("faults").await.unwrap();
    assert!(!same.changed && same.plugin.active.is_some());

    rig.replace("a.wasm", &faults("# new\n"));
    let (mut changed, mut seen) = (false, same.plugin.active);
    for _ in 0..2 {
        // The watcher may have been first.
        let reloaded = rig.reloader.reload("faults").await.unwrap();
        changed |= reloaded.changed || reloaded.plugin.active != seen;
        seen = reloaded.plugin.active;
    }
    assert!(changed);

    // Who asks says that the file is finished: there is no waiting for it to settle.
    rig.replace("a.wasm", &faults("")[..1000]);
    let refused = rig.reloader.reload("faults").await.unwrap_err().to_string();
    assert!(refused.starts_with("plugin faults: is cut short"), "{refused}");
    let PluginStatus { active, refused, .. } = rig.host.status("faults").unwrap();
    assert_eq!(active, seen);
    assert!(refused.is_some_and(|refused| refused.digest.is_some()));

    std::fs::remove_file(rig.path("a.wasm")).unwrap();
    let gone = rig.reloader.reload("faults").await;
    assert!(matches!(gone, Ok(ref gone) if gone.changed && gone.plugin.active.is_none()) || gone.is_err(), "{gone:?}");
    assert!(rig.host.status("faults").is_none());
    let reloader = rig.reloader.clone();
    rig.close().await;
    assert!(matches!(reloader.reload_all().await, Err(Error::Stopped(_))));
}

/// Events that flow while plugins are replaced.
const EVENTS: usize = 20_000;

/// Good versions that take over one after the other.
const SWAPS: usize = 50;

/// What a version says and when it served: since the one moment at the earliest, and until the next one was seen.
struct Activation {
    digest: String,
    since: Timestamp,
    seen: Timestamp,
}

/// The nth version of a plugin. One in five can be kept busy; the others are built faster.
fn version(n: usize) -> Vec<u8> {
    let manifest = FAULTS.replace("1.0.0", &format!("1.{n}.0")) + &subscribed("faults.**", "faults");
    embed_manifest(&guest(if n.is_multiple_of(5) { "faults" } else { "audit-trail" }), &manifest).unwrap()
}

/// How candidates are bad, each in the place of the file that serves or beside it.
fn spoil(rig: &Rig, kind: &str) {
    let good = version(1_000);
    let component = |text: &str| wat::parse_str(text).unwrap();
    let named = |bytes: &[u8]| embed_manifest(bytes, "name = \"faults\"\nversion = \"9.9.9\"\n").unwrap();
    match kind {
        "truncated" => rig.replace("a.wasm", &good[..good.len() / 2]),
        "wrong world" => {
            let other = component("(component (instance $i) (export \"wasi:cli/run@0.2.0\" (instance $i)))");
            rig.replace("a.wasm", &named(&other));
        }
        "ungranted" => {
            let greedy = FAULTS.replace("kv = [\"faults\"]", "kv = [\"faults\", \"payroll\"]");
            rig.replace("a.wasm", &embed_manifest(&guest("faults"), &greedy).unwrap());
        }
        "core module" => rig.replace("a.wasm", &component("(module)")),
        "damaged manifest" => {
            let place = good.windows(9).position(|window| window == b"version =").unwrap();
            rig.replace("a.wasm", &[&good[..place], b"versiom", &good[place + 7..]].concat());
        }
        "text" => rig.replace("a.wasm", b"#!/bin/sh\necho no component\n"),
        "does not compile" => {
            let broken = component(
                "(component (core module (func (result i32)))
                    (instance $h) (export \"tidegate:plugin/handler@1.0.0\" (instance $h)))",
            );
            rig.replace("a.wasm", &named(&broken));
        }
        "second of its name" => rig.replace("b.wasm", &good),
        "empty" => rig.replace("a.wasm", b""),
        "unreadable" => {
            symlink("a.wasm", rig.path(".beside")).unwrap();
            std::fs::rename(rig.path(".beside"), rig.path("a.wasm")).unwrap();
        }
        other => panic!("{other}"),
    }
}

const SPOILED: [(&str, &str); 10] = [
    ("truncated", "is cut short"),
    ("wrong world", "is a WASI command"),
    ("ungranted", "add kv = [\"payroll\"]"),
    ("core module", "is a core module"),
    ("damaged manifest", "unknown field `versiom`"),
    ("text", "is not WebAssembly"),
    ("does not compile", "cannot be compiled"),
    ("second of its name", "needs the name faults"),
    ("empty", "is empty"),
    ("unreadable", "cannot be read"),
];

/// Waits until the version with these bytes serves.
async fn activated(rig: &Rig, bytes: &[u8]) -> Activation {
    let digest = tidegate::host::component::digest(bytes);
    let serving = || rig.host.status("faults").and_then(|status| status.active).filter(|one| *one.digest == *digest);
    until("the new version serves", async || serving().is_some()).await;
    let (since, seen) = (serving().unwrap().active_since, Timestamp::now());
    Activation { digest, since, seen }
}

/// Replaces a plugin 50 times, ten times with something bad in between, while 20,000 events flow.
async fn reload_under_load(provider: Arc<dyn Provider>) {
    let rig = Rig::over(provider, &[("a.wasm", version(0))]).await;
    let mut history = vec![activated(&rig, &version(0)).await];
    let steps = SWAPS + SPOILED.len();
    let mut published = 0;
    for step in 0..steps {
        let upto = EVENTS * (step + 1) / steps;
        let batch = (published..upto).map(|n| {
            let payload = if n % 200 == 0 { json!({"fault": "spin", "ms": 10}) } else { json!({"fault": "none"}) };
            event("faults.tests.create", &format!("e-{n}"), &payload)
        });
        rig.broker.publish_batch(batch.collect()).await.unwrap();
        published = upto;
        match SPOILED.get(step / 6).filter(|_| step % 6 == 5) {
            Some((kind, words)) => {
                spoil(&rig, kind);
                let told = || rig.host.status("faults").and_then(|status| status.refused);
                until(kind, async || told().is_some_and(|refused| refused.error.contains(words))).await;
                let active = rig.host.active("faults").unwrap();
                assert_eq!(**active.digest(), *history.last().unwrap().digest, "{kind}");
                drop(std::fs::remove_file(rig.path("b.wasm")));
            }
            None => {
                let bytes = version(history.len());
                match step % 2 {
                    0 => rig.replace("a.wasm", &bytes),
                    _ => std::fs::write(rig.path("a.wasm"), &bytes).unwrap(),
                }
                history.push(activated(&rig, &bytes).await);
            }
        }
    }
    assert_eq!((published, history.len()), (EVENTS, SWAPS + 1));
    until("all is handled", async || {
        let stats = rig.broker.stats().await.unwrap().provider_stats;
        stats.pending_deliveries + stats.processing_deliveries == 0
    })
    .await;
    let used = check_every_attempt(&rig, &history).await;
    assert!(used > SWAPS / 2, "only {used} versions were called: that is no load");
    rig.close().await;
}

/// Every event is completed by one attempt, on a version that was active when that attempt began. Returns how many
/// versions were called.
async fn check_every_attempt(rig: &Rig, history: &[Activation]) -> usize {
    let place: BTreeMap<&str, usize> =
        history.iter().enumerate().map(|(place, one)| (one.digest.as_str(), place)).collect();
    let mut used = std::collections::BTreeSet::new();
    // Records count microseconds.
    let tick = Duration::from_micros(2);
    for n in 0..EVENTS {
        let delivery = rig.delivery(&format!("e-{n}")).await;
        let [attempt] = &delivery.attempts[..] else { panic!("e-{n}: {delivery:?}") };
        assert_eq!((delivery.status, attempt.verdict), (Status::Completed, Verdict::Ok), "e-{n}: {attempt:?}");
        let digest = attempt.trace.digest.as_deref().unwrap();
        let served = place[digest];
        used.insert(served);
        let until = history.get(served + 1).map_or(Timestamp::MAX, |next| next.seen);
        assert!(attempt.started_at <= until, "e-{n} began after its version was replaced: {attempt:?} {until}");
        let ended = attempt.started_at + Duration::from_micros(attempt.duration_us) + tick;
        assert!(ended >= history[served].since, "e-{n} ended before its version served: {attempt:?}");
    }
    used.len()
}

/// Invariants 3, 4 and 7: a reload loses nothing, repeats nothing, and calls nothing that does not serve.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_reloads_under_load_lose_nothing_on_memory() {
    reload_under_load(Arc::new(MemoryProvider::open(roomy()).unwrap())).await;
}

/// The same over SQLite.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_reloads_under_load_lose_nothing_on_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", folder.path().join("tidegate.db").display());
    let provider = SqliteProvider::open(sqlite::Options { url, ..sqlite::Options::default() }).await.unwrap();
    reload_under_load(Arc::new(provider)).await;
}
