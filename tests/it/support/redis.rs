//! Private Redis servers on 127.0.0.1, with their data in a folder of their own.
//!
//! A server ends with whoever holds it, and with the process that started it, even when that is killed. Included by path
//! where servers are needed: by the provider's tests, the integration tests and the benches.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::child;

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running server.
pub(crate) struct RedisServer {
    folder: tempfile::TempDir,
    arguments: Vec<String>,
    child: Option<Child>,
    /// The port, the same after a restart.
    pub(crate) port: u16,
}

impl RedisServer {
    /// Starts a server with these settings, such as `["--appendonly", "yes"]`, and waits until it answers.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let mut server = Self { folder, arguments, child: None, port };
        server.restart();
        server
    }

    /// `redis://127.0.0.1:PORT`.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Starts the server again on its data, where it does not run.
    pub(crate) fn restart(&mut self) {
        if self.child.is_some() {
            return;
        }
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "redis-server", "--bind", "127.0.0.1", "--save", ""]);
        command.args(["--port", &self.port.to_string(), "--dir", self.folder.path().to_str().unwrap()]);
        command.args(["--logfile", self.folder.path().join("redis.log").to_str().unwrap()]);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(child::spawn_from_a_thread_that_stays(command));
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(Instant::now() < until, "redis-server does not answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the server logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("redis.log")).unwrap_or_default()
    }

    /// SIGKILL: nothing is flushed.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}
