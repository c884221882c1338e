//! Programs in processes of their own: the peers of `benches/peers`, and this program itself, which as a process is called
//! in the same way.
//!
//! A program is called with what to do, the store's URL where it has one, and a count. It prints work per second on its
//! last line; `work` prints `ready` and then milliseconds, line by line, of what a process that is told to `pace` sends.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

/// How long a program may run, in seconds: one that hangs ends the benchmark with an error, and not never.
const PATIENCE: &str = "300";

/// How many of the first events of `pace` do not count: who waits for them may not listen yet.
const WARM_UP: usize = 10;

/// A program that measures one thing per call.
pub(crate) struct Peer {
    words: Vec<OsString>,
}

/// A peer that cargo builds; `None`, with the reason printed, when it cannot be built here.
pub(crate) fn cargo(name: &str) -> Option<Peer> {
    let folder = folder(name);
    let built = Command::new(env!("CARGO")).args(["build", "--release", "--locked"]).current_dir(&folder).status();
    if !built.is_ok_and(|status| status.success()) {
        println!("{name} cannot be built here: rows against it are left out");
        return None;
    }
    Some(Peer { words: vec![folder.join("target/release").join(name).into()] })
}

/// A peer that runs on Node.js; `None`, with the reason printed, when it cannot be installed here.
pub(crate) fn node(name: &str) -> Option<Peer> {
    static INSTALLED: LazyLock<bool> = LazyLock::new(|| {
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-save", "--omit=optional", "--ignore-scripts", "--no-fund", "--no-audit"]);
        npm.arg("--loglevel=error").current_dir(folder("node")).stdout(Stdio::null());
        let has_node = Command::new("node").arg("--version").stdout(Stdio::null()).status();
        has_node.is_ok_and(|status| status.success()) && npm.status().is_ok_and(|status| status.success())
    });
    if !*INSTALLED {
        println!(
            "{name} cannot be installed here (that needs node, npm and its registry): rows against it are left out"
        );
        return None;
    }
    Some(Peer { words: vec!["node".into(), folder("node").join(format!("{name}.js")).into()] })
}

/// This program as a process of its own, see [`process`](crate::process).
pub(crate) fn ourselves() -> Peer {
    Peer { words: vec![std::env::current_exe().unwrap().into(), crate::process::WORD.into()] }
}

fn folder(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers").join(name)
}

impl Peer {
    /// The program, called with these words.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--foreground", PATIENCE]).args(&self.words).args(arguments).stdout(Stdio::piped());
        command
    }

    /// Runs the program and reads the figure that it prints last.
    pub(crate) fn measure(&self, arguments: &[&str]) -> f64 {
        let output = self.command(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let last = text.lines().last().unwrap_or_default();
        let said = String::from_utf8_lossy(&output.stderr);
        last.trim().parse().unwrap_or_else(|_| panic!("{:?} printed {text:?} {said}", self.words))
    }

    /// Times from publish to the start of the handler, at 50 a second, from one process to another.
    pub(crate) fn pick_up(&self, url: &str, count: usize) -> Vec<Duration> {
        let count = (count + WARM_UP).to_string();
        let mut worker = self.command(&["work", url, &count]).spawn().unwrap();
        let mut lines = BufReader::new(worker.stdout.take().unwrap()).lines().map(Result::unwrap);
        assert_eq!(lines.next().as_deref(), Some("ready"), "{:?}", self.words);
        assert!(self.command(&["pace", url, &count]).status().unwrap().success(), "{:?}", self.words);
        let millis = |line: String| line.parse::<f64>().unwrap() / 1e3;
        let times = lines.map(millis).map(|seconds| Duration::from_secs_f64(seconds.max(0.0))).skip(WARM_UP).collect();
        assert!(worker.wait().unwrap().success(), "{:?}", self.words);
        times
    }
}
