//! Private NATS servers with JetStream on 127.0.0.1, with their data in a folder of their own.
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
pub(crate) struct NatsServer {
    folder: tempfile::TempDir,
    arguments: Vec<String>,
    child: Option<Child>,
    /// The port, the same after a restart.
    pub(crate) port: u16,
}

impl NatsServer {
    /// Starts a server with these arguments besides, such as `["--user", "u", "--pass", "p"]`, and waits until it answers.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let mut server = Self { folder, arguments, child: None, port };
        server.restart();
        server
    }

    /// `nats://127.0.0.1:PORT`.
    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Starts the server again on its data, where it does not run.
    pub(crate) fn restart(&mut self) {
        if self.child.is_some() {
            return;
        }
        let folder = self.folder.path().to_str().unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nats-server", "--addr", "127.0.0.1", "-js", "-sd", folder]);
        command.args(["--port", &self.port.to_string(), "--log", &format!("{folder}/nats.log")]);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(child::spawn_from_a_thread_that_stays(command));
        let until = Instant::now() + PATIENCE;
        // The port is open before JetStream has read its streams; the log says when it has.
        while !self.log().contains("Server is ready") || TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(Instant::now() < until, "nats-server does not answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the server has logged since it was started last.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("nats.log")).unwrap_or_default()
    }

    /// SIGKILL: nothing is flushed.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
            drop(std::fs::remove_file(self.folder.path().join("nats.log")));
        }
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.kill();
    }
}
