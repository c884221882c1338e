//! A real `tidegate serve` process on a free port, with its data in a folder that the test owns.
//!
//! A server ends with the test, killed by its process id; nothing is left running, whatever the test does.

use std::io::Read as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a server may take to become ready; a cold debug build compiling plugins is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server.
pub(crate) struct Server {
    child: Child,
    log: PathBuf,
    /// Such as `http://127.0.0.1:40123`.
    pub(crate) url: String,
    client: reqwest::Client,
}

/// What a server answered.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The HTTP status.
    pub(crate) status: u16,
    /// The body, where it is JSON.
    pub(crate) json: Value,
}

/// The folder with the plugins that `make plugins` builds.
pub(crate) fn built_plugins() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/plugins");
    assert!(folder.join("faults.wasm").exists(), "{} is not built: run `make plugins` first", folder.display());
    folder
}

/// A port that nobody listens on.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Server {
    /// Starts a server with these arguments after `serve --listen …`, its log in `folder`, and waits until it is ready.
    pub(crate) async fn start(folder: &Path, arguments: &[&str]) -> Self {
        let mut server = Self::spawn(folder, arguments);
        server.ready().await;
        server
    }

    /// Starts a server and does not wait.
    pub(crate) fn spawn(folder: &Path, arguments: &[&str]) -> Self {
        Self::spawn_on(&format!("127.0.0.1:{}", free_port()), folder, arguments)
    }

    /// Starts a server at an address of the test's choice and does not wait.
    pub(crate) fn spawn_on(listen: &str, folder: &Path, arguments: &[&str]) -> Self {
        Self::spawn_with(listen, folder, arguments, &[])
    }

    /// As [`spawn_on`](Self::spawn_on), with these variables in its environment.
    pub(crate) fn spawn_with(listen: &str, folder: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let log = folder.join("server.log");
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args(["serve", "--listen", listen])
            .args(arguments)
            .env_remove("RUST_LOG")
            .envs(environment.iter().copied())
            .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        let client = super::wire::client();
        Self { child, log, url: format!("http://{listen}"), client }
    }

    /// Waits until `/readyz` says yes.
    pub(crate) async fn ready(&mut self) {
        let until = Instant::now() + PATIENCE;
        loop {
            let answer = self.client.get(format!("{}/readyz", self.url)).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < until, "not ready ({ended:?}): {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What the server logged.
    pub(crate) fn log(&self) -> String {
        let mut text = String::new();
        std::fs::File::open(&self.log).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    /// The server's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL: no handler runs, nothing is flushed.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and the exit status.
    pub(crate) fn stop(&mut self) -> std::process::ExitStatus {
        self.signal("-TERM");
        self.child.wait().unwrap()
    }

    /// SIGSTOP: the process stands still, its connections stay open.
    pub(crate) fn freeze(&self) {
        self.signal("-STOP");
    }

    /// SIGCONT: it goes on.
    pub(crate) fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.pid().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// GETs a path.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.try_send(self.client.get(format!("{}{path}", self.url))).await.unwrap()
    }

    async fn try_send(&self, request: reqwest::RequestBuilder) -> reqwest::Result<Answer> {
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let json = serde_json::from_slice(&answer.bytes().await?).unwrap_or(Value::Null);
        Ok(Answer { status, json })
    }

    /// Every event of the log, newest first, page by page.
    pub(crate) async fn all_events(&self) -> Vec<Value> {
        let (mut events, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = self.get(&format!("/v1/events?limit=500{cursor}")).await;
            assert_eq!(page.status, 200, "{page:?}");
            events.extend(page.json["events"].as_array().unwrap().iter().cloned());
            match page.json["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return events,
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
