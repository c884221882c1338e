//! Everything that a claim about speed rests on: each row runs ours and a named peer or limit in turn.
//!
//! `cargo bench` runs all but the soak and the held transaction; `cargo bench -- memory` what is named. Ratios are medians of pairs taken within one run.
//! Peers and servers that are not installed are named, and their rows left out.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a benchmark that panics has no result"
)]

mod capture;
#[path = "../tests/it/support/child.rs"]
mod child;
mod delivery;
mod held;
mod isolation;
mod keep;
mod memory;
mod nats;
mod nats_peers;
#[path = "../tests/it/support/nats.rs"]
mod nats_server;
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

/// As the binary has it; for both sides of every row.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    // Cargo passes `--bench`; whatever else is given names the groups to run.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    if let Some((first, rest)) = wanted.split_first()
        && first == process::WORD
    {
        return process::run(rest);
    }
    let groups: [(&str, fn()); 18] = [
        ("memory", memory::run),
        ("memory-matching", memory::matching),
        ("capture", capture::run),
        ("sqlite", sqlite::run),
        ("postgres", postgres::run),
        ("postgres-peers", postgres_peers::run),
        ("postgres-replicas", replicas::run),
        ("postgres-sequencing", sequencing::run),
        ("redis", redis::run),
        ("nats", nats::run),
        ("nats-memory", keep::nats),
        ("nats-peers", nats_peers::run),
        ("redis-memory", keep::redis),
        ("redis-peers", redis_peers::run),
        ("plugins", plugins::run),
        ("plugins-delivery", delivery::run),
        ("plugins-isolation", isolation::run),
        ("serve", serve::run),
    ];
    // A whole name is that group alone, and a part of a name all groups that have it.
    let is_meant = |word: &String, name: &str| match groups.iter().any(|group| group.0 == word) {
        true => name == word,
        false => name.contains(word.as_str()),
    };
    for (name, run) in groups {
        if wanted.is_empty() || wanted.iter().any(|word| is_meant(word, name)) {
            run();
        }
    }
    // Minutes that nobody asked for are not spent.
    let long: [(&str, fn()); 2] = [("soak", soak::run), ("held", held::run)];
    for (name, run) in long {
        if wanted.iter().any(|word| word == name) {
            run();
        }
    }
}
