//! A private PostgreSQL: on a free port of 127.0.0.1, with its data in a folder of its own, gone with the test process.
//!
//! The server is the child of a small shell that waits on a pipe which this process holds open. However the process ends,
//! the pipe closes, and the shell stops the server and removes the folder. Nothing here knows tidegate, so that unit
//! tests, integration tests and benchmarks all use this one file (`#[path]`).

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a server may take to answer after it was started, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the shell does: runs the server, tells its process id, waits for the pipe, stops the server.
const GUARD: &str = r#"
folder=$1; shift
"$@" >>"$folder/log" 2>&1 &
server=$!
echo $server
read -r word || word=gone
kill -QUIT $server 2>/dev/null
wait $server
[ "$word" = keep ] || rm -rf "$folder"
"#;

/// Whether what was committed survives the machine: tests of a crash of the server alone do not need it, but come closer
/// to the truth with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fsync {
    /// As in production.
    On,
    /// Fast.
    Off,
}

/// A running server.
pub(crate) struct Postgres {
    binaries: PathBuf,
    user: Option<(u32, u32)>,
    folder: PathBuf,
    port: AtomicU16,
    fsync: Fsync,
    running: Mutex<Option<Running>>,
}

struct Running {
    shell: Child,
    server: u32,
}

static SHARED: OnceLock<Postgres> = OnceLock::new();
static NAMES: AtomicU32 = AtomicU32::new(0);

/// The folder with `initdb` and `postgres`: Debian's newest, or one on the PATH.
fn binaries() -> PathBuf {
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut folders: Vec<(u32, PathBuf)> = debian
        .map(|entry| (entry.file_name().to_string_lossy().parse().unwrap_or(0), entry.path().join("bin")))
        .collect();
    folders.sort();
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = folders.into_iter().rev().map(|(_, folder)| folder).chain(std::env::split_paths(&paths));
    let complete =
        |folder: &PathBuf| ["initdb", "postgres", "pg_isready"].iter().all(|name| folder.join(name).exists());
    let words = "no PostgreSQL is installed (neither /usr/lib/postgresql/*/bin nor PATH has initdb and postgres): run \
                 `make setup`, or install the package postgresql";
    found.into_iter().find(complete).unwrap_or_else(|| panic!("{words}"))
}

/// PostgreSQL does not run as root: then another user does.
fn unprivileged() -> Option<(u32, u32)> {
    if std::fs::metadata("/proc/self").map(|me| me.uid()).unwrap_or(1) != 0 {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let ids = |name: &str| {
        let fields: Vec<&str> = users.lines().find(|line| line.starts_with(&format!("{name}:")))?.split(':').collect();
        Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
    };
    Some(ids("postgres").or_else(|| ids("nobody")).unwrap_or((65_534, 65_534)))
}

/// A port that nobody listens on.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port()
}

fn checked(output: Output, what: &str) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{what}: {} {}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

impl Postgres {
    /// The one server of this test process, started when it is first asked for. Fast, and not safe from power cuts.
    pub(crate) fn shared() -> &'static Self {
        SHARED.get_or_init(|| Self::start(Fsync::Off))
    }

    /// A server of one's own.
    pub(crate) fn start(fsync: Fsync) -> Self {
        let server = Self::without_data(fsync);
        let data = server.folder.join("data").display().to_string();
        let mut initdb = server.command("initdb");
        initdb.args(["-D", &data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]);
        checked(initdb.output().expect("initdb"), "initdb");
        server.guard("guarded");
        server.run_on(|| server.port.store(free_port(), Ordering::Relaxed));
        server
    }

    /// A hot standby of this server, made from a base backup: it follows, and can be read.
    pub(crate) fn standby(&self) -> Self {
        let server = Self::without_data(self.fsync);
        let (data, url) = (server.folder.join("data").display().to_string(), self.url("postgres"));
        let mut backup = server.command("pg_basebackup");
        backup.args(["-D", &data, "-d", &url, "-R", "-X", "stream", "-c", "fast", "--no-sync"]);
        checked(backup.output().expect("pg_basebackup"), "pg_basebackup");
        server.run_on(|| server.port.store(free_port(), Ordering::Relaxed));
        server
    }

    fn without_data(fsync: Fsync) -> Self {
        let user = unprivileged();
        let name = format!("tidegate-pg-{}-{}", std::process::id(), NAMES.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        drop(std::fs::remove_dir_all(&folder));
        std::fs::create_dir(&folder).expect("a folder for the server");
        if let Some((uid, gid)) = user {
            chown(&folder, Some(uid), Some(gid)).expect("a folder of the server's own");
        }
        Self { binaries: binaries(), user, folder, port: AtomicU16::new(free_port()), fsync, running: Mutex::new(None) }
    }

    fn port(&self) -> u16 {
        self.port.load(Ordering::Relaxed)
    }

    /// Asks this user for a password, unlike all others.
    fn guard(&self, user: &str) {
        let file = self.folder.join("data/pg_hba.conf");
        let rules = std::fs::read_to_string(&file).expect("pg_hba.conf");
        std::fs::write(&file, format!("host all {user} 127.0.0.1/32 scram-sha-256\n{rules}")).expect("pg_hba.conf");
    }

    fn command(&self, program: &str) -> Command {
        self.as_user(&self.binaries.join(program))
    }

    fn as_user(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.folder).env("LC_ALL", "C").stdin(Stdio::null());
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// Starts the server, again after [`kill`](Self::kill), and waits until it answers.
    pub(crate) fn run(&self) {
        self.run_on(|| {});
    }

    /// Starts the server until it stays; `otherwise` before each time but the first.
    fn run_on(&self, otherwise: impl Fn()) {
        let until = Instant::now() + PATIENCE;
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut spawned = self.spawn();
            while spawned.shell.try_wait().ok().flatten().is_none() && alive(spawned.server) {
                if self.is_ready() {
                    *running = Some(spawned);
                    return;
                }
                assert!(Instant::now() < until, "PostgreSQL does not answer: {}", self.log());
                std::thread::sleep(Duration::from_millis(20));
            }
            // What is left of a killed server may hold its shared memory for a moment.
            release(spawned, "keep\n");
            assert!(Instant::now() < until, "PostgreSQL does not start: {}", self.log());
            std::thread::sleep(Duration::from_millis(100));
            // Somebody else may have taken the port meanwhile.
            otherwise();
        }
    }

    fn spawn(&self) -> Running {
        let (on, folder) = (self.fsync == Fsync::On, self.folder.display().to_string());
        let settings = [
            format!("port={}", self.port()),
            "listen_addresses=127.0.0.1".to_owned(),
            format!("unix_socket_directories={folder}"),
            format!("fsync={}", if on { "on" } else { "off" }),
            format!("full_page_writes={}", if on { "on" } else { "off" }),
            "max_connections=300".to_owned(),
            "shared_buffers=64MB".to_owned(),
            "dynamic_shared_memory_type=mmap".to_owned(),
        ];
        let mut shell = self.as_user(Path::new("/bin/sh"));
        shell.args(["-c", GUARD, "guard", &folder]).arg(self.binaries.join("postgres"));
        shell.arg("-D").arg(self.folder.join("data"));
        shell.args(settings.iter().flat_map(|setting| ["-c", setting.as_str()]));
        let mut shell =
            shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("a shell");
        let mut line = String::new();
        let out = shell.stdout.as_mut().expect("the shell's output");
        BufReader::new(out).read_line(&mut line).expect("the server's process id");
        Running { shell, server: line.trim().parse().expect("a process id") }
    }

    fn is_ready(&self) -> bool {
        let mut command = self.command("pg_isready");
        command.args(["-q", "-h", "127.0.0.1", "-p", &self.port().to_string(), "-t", "5"]);
        command.status().is_ok_and(|status| status.success())
    }

    /// Ends the server as a crash does: SIGKILL for its first process, whose children then end by themselves.
    pub(crate) fn kill(&self) {
        if let Some(running) = self.running.lock().unwrap_or_else(PoisonError::into_inner).take() {
            signal("KILL", running.server);
            release(running, "keep\n");
        }
    }

    /// What the server said.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// The URL of a database as the superuser, over TCP.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port())
    }

    /// A name that no other test of this server uses.
    pub(crate) fn fresh_name(&self) -> String {
        format!("t{}", NAMES.fetch_add(1, Ordering::Relaxed))
    }

    /// Runs SQL as the superuser with `psql`, and returns its unadorned output.
    pub(crate) fn psql(&self, database: &str, text: &str) -> String {
        let mut command = self.command("psql");
        command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", &self.url(database), "-c", text]);
        checked(command.output().expect("psql"), text).trim().to_owned()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        match running {
            Some(running) => release(running, "gone\n"),
            None => drop(std::fs::remove_dir_all(&self.folder)),
        }
    }
}

/// Lets go of a server: its shell stops it, and removes its folder unless told to keep it.
fn release(mut running: Running, word: &str) {
    if let Some(mut pipe) = running.shell.stdin.take() {
        drop(pipe.write_all(word.as_bytes()));
    }
    drop(running.shell.wait());
}

fn signal(name: &str, process: u32) {
    drop(Command::new("kill").args([format!("-{name}"), process.to_string()]).stderr(Stdio::null()).status());
}

fn alive(process: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // A zombie has ended.
    !status.is_empty() && !status.contains(") Z ")
}
