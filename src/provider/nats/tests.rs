//! JetStream against the suite, and what only a replicated state can get wrong.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::provider::conformance::Fixture;

#[path = "../../../tests/it/support/nats.rs"]
mod server;

use server::NatsServer;

/// The server that tests of one process share, each with a namespace of its own.
fn shared() -> &'static NatsServer {
    static SERVER: OnceLock<NatsServer> = OnceLock::new();
    SERVER.get_or_init(|| NatsServer::start(&[]))
}

struct Place {
    url: String,
    time: Arc<AtomicI64>,
}

impl Place {
    fn new() -> Self {
        Self::on(shared())
    }

    fn on(server: &NatsServer) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let url = format!("{}?namespace=test-{}", server.url(), COUNT.fetch_add(1, Ordering::Relaxed));
        let time = Arc::new(AtomicI64::new(crate::event::now().as_microsecond() + 60_000_000));
        Self { url, time }
    }

    fn options(&self) -> Options {
        Options { url: self.url.clone(), ..Options::default() }
    }

    async fn provider(&self) -> NatsProvider {
        let time = Arc::clone(&self.time);
        let clock: Clock = Arc::new(move || time.load(Ordering::Relaxed));
        NatsProvider::with_clock(self.options(), clock).await.unwrap()
    }
}

#[async_trait]
impl Fixture for Place {
    async fn open(&self) -> Arc<dyn Provider> {
        Arc::new(self.provider().await)
    }

    fn reopens(&self) -> Result<(), &'static str> {
        Ok(())
    }

    async fn advance(&self, by: Duration) {
        self.time.fetch_add(as_micros(by), Ordering::Relaxed);
    }
}

mod conformance {
    use super::Place;

    conformance_tests!(Place::new());
}
