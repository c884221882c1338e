//! How long `tidegate serve` takes to be ready, and what it holds in memory then: figures, not ratios.
//!
//! `cargo bench -- serve`. SQLite in a temporary folder, the three sample plugins of `make plugins`. Cold compiles the
//! plugins; warm finds them in the compile cache.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support;

const SAMPLES: [&str; 3] = ["order-totals", "signup-guard", "audit-trail"];

pub(crate) fn run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let plugins = folder.path().join("plugins");
    std::fs::create_dir(&plugins).unwrap();
    for sample in SAMPLES {
        let file = format!("{sample}.wasm");
        let built = root.join("target/plugins").join(&file);
        if std::fs::copy(&built, plugins.join(&file)).is_err() {
            println!("{} is not built: run `make plugins` first; the rows of serve are left out", built.display());
            return;
        }
    }
    let config = folder.path().join("tidegate.toml");
    let grants = std::fs::read_to_string(root.join("examples/quickstart/tidegate.toml")).unwrap();
    let cache = folder.path().join("cache");
    std::fs::write(&config, format!("{grants}\n[host]\ncache = \"{}\"\n", cache.display())).unwrap();
    let (mut cold, mut warm, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..support::PAIRS {
        std::fs::remove_dir_all(&cache).ok();
        cold.push(start(folder.path(), &config, &plugins).0);
        let (ready, resident) = start(folder.path(), &config, &plugins);
        warm.push(ready);
        memory.push(resident);
    }
    println!("serve, start to ready, three samples, cold compile cache: {:.0} ms", support::median(cold));
    println!("serve, start to ready, three samples, warm compile cache: {:.0} ms", support::median(warm));
    println!("serve, resident memory when ready and idle, three samples: {:.1} MiB", support::median(memory));
}

/// Milliseconds to ready, and MiB resident then.
fn start(folder: &Path, config: &Path, plugins: &Path) -> (f64, f64) {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let database = format!("sqlite://{}", folder.join(format!("bench-{port}.db")).display());
    let began = Instant::now();
    let mut server = Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(["serve", "--listen", &address, "--provider", &database, "--config"])
        .arg(config)
        .arg("--plugins")
        .arg(plugins)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !is_ready(&address) {
        assert!(began.elapsed() < Duration::from_secs(60) && server.try_wait().unwrap().is_none(), "never ready");
        std::thread::sleep(Duration::from_millis(1));
    }
    let ready = began.elapsed().as_secs_f64() * 1e3;
    let resident = support::resident(server.id());
    server.kill().unwrap();
    server.wait().unwrap();
    (ready, resident)
}

fn is_ready(address: &str) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else { return false };
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    stream.write_all(request.as_bytes()).is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.starts_with("HTTP/1.1 200")
}
