//! SQLite against the suite, and what only a file can get wrong.

use std::sync::atomic::AtomicI64;

use super::*;
use crate::provider::conformance::Fixture;

struct File {
    folder: tempfile::TempDir,
    time: Arc<AtomicI64>,
}

impl File {
    fn new() -> Self {
        let time = Arc::new(AtomicI64::new(crate::event::now().as_microsecond() + 60_000_000));
        Self { folder: tempfile::tempdir().unwrap(), time }
    }

    fn options(&self) -> Options {
        let path = self.folder.path().join("t.db");
        Options { url: format!("sqlite://{}", path.display()), ..Options::default() }
    }

    async fn provider(&self) -> SqliteProvider {
        let time = Arc::clone(&self.time);
        let clock: Clock = Arc::new(move || time.load(Ordering::Relaxed));
        SqliteProvider::with_clock(self.options(), clock).await.unwrap()
    }
}

#[async_trait]
impl Fixture for File {
    async fn open(&self) -> Arc<dyn Provider> {
        Arc::new(self.provider().await)
    }

    fn reopens(&self) -> Result<(), &'static str> {
        Ok(())
    }

    async fn advance(&self, by: Duration) {
        self.time.fetch_add(writer::as_micros(by), Ordering::Relaxed);
    }
}

mod conformance {
    use super::File;

    conformance_tests!(File::new());
}
