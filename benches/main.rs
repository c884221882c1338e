//! Everything that a claim about speed rests on: each row runs ours and a named peer or limit in turn.
//!
//! `cargo bench` runs all but the soak; `cargo bench -- memory` what is named. Ratios are medians of pairs taken within one run.
//! Peers and servers that are not installed are named, and their rows left out.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a benchmark that panics has no result"
)]

mod capture;
mod delivery;
mod isolation;
mod memory;
mod peer;
mod plugins;
mod postgres;
mod postgres_peers;
#[path = "../tests/it/support/postgres.rs"]
#[expect(dead_code, clippy::expect_used, reason = "tests use more of it, and one that panics has failed")]
mod postgres_server;
mod process;
mod redis;
mod redis_peers;
#[path = "../tests/it/support/redis.rs"]
mod redis_server;
mod replicas;
mod rig;
mod sequencing;
mod serve;
mod soak;
mod sqlite;
mod support;

fn main() {
    // Cargo passes `--bench`; whatever else is given names the groups to run.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    if let Some((first, rest)) = wanted.split_first()
        && first == process::WORD
    {
        return process::run(rest);
    }
    let groups: [(&str, fn()); 13] = [
        ("memory", memory::run),
        ("capture", capture::run),
        ("sqlite", sqlite::run),
        ("postgres", postgres::run),
        ("postgres-peers", postgres_peers::run),
        ("postgres-replicas", replicas::run),
        ("postgres-sequencing", sequencing::run),
        ("redis", redis::run),
        ("redis-peers", redis_peers::run),
        ("plugins", plugins::run),
        ("plugins-delivery", delivery::run),
        ("plugins-isolation", isolation::run),
        ("serve", serve::run),
    ];
    for (name, run) in groups {
        if wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str())) {
            run();
        }
    }
    // Minutes that nobody asked for are not spent.
    if wanted.iter().any(|word| word == "soak") {
        soak::run();
    }
}
