//! A stretch of network that can be made bad: between a client and a PostgreSQL, without TLS.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the server's `NotificationResponse` begins with.
const NOTIFICATION: u8 = b'A';

/// Forwards connections to a server.
pub(crate) struct Proxy {
    address: String,
    /// Where new connections lead.
    server: Arc<Mutex<String>>,
    /// Notifications do not come through, as behind a pooler that shares connections.
    swallows: Arc<AtomicBool>,
    /// Grows when the listening connections of now are to carry nothing any more, and stay open.
    frozen: watch::Sender<u64>,
}

impl Proxy {
    /// In front of `server`, an address.
    pub(crate) async fn start(server: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (swallows, frozen) = (Arc::new(AtomicBool::new(false)), watch::Sender::new(0));
        let (rule, freezes) = (Arc::clone(&swallows), frozen.subscribe());
        let server = Arc::new(Mutex::new(server));
        let target = Arc::clone(&server);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = target.lock().unwrap().clone();
                tokio::spawn(forward(client, server, Arc::clone(&rule), freezes.clone()));
            }
        });
        Self { address, server, swallows, frozen }
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Leads whoever connects from now on to another server.
    pub(crate) fn lead_to(&self, server: String) {
        *self.server.lock().unwrap() = server;
    }

    pub(crate) fn swallow_notifications(&self) {
        self.swallows.store(true, Ordering::SeqCst);
    }

    pub(crate) fn freeze_listeners(&self) {
        self.frozen.send_modify(|count| *count += 1);
    }
}

async fn forward(client: TcpStream, server: String, swallows: Arc<AtomicBool>, mut freezes: watch::Receiver<u64>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    freezes.borrow_and_update();
    let ((mut asks, tells), (answers, mut server)) = (client.into_split(), server.into_split());
    let mut hello = vec![0; 4_096];
    let Ok(length) = asks.read(&mut hello).await else { return };
    hello.truncate(length);
    let listens = hello.windows(8).any(|word| word == b"listener");
    if server.write_all(&hello).await.is_err() {
        return;
    }
    let both = async {
        tokio::select! {
            _ = tokio::io::copy(&mut asks, &mut server) => {}
            () = tell(answers, tells, swallows) => {}
        }
    };
    tokio::select! {
        () = both => {}
        () = frozen(&mut freezes), if listens => std::future::pending().await,
    }
}

async fn frozen(freezes: &mut watch::Receiver<u64>) {
    if freezes.changed().await.is_err() {
        std::future::pending().await
    }
}

/// Hands the server's messages on, one by one.
async fn tell(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, swallows: Arc<AtomicBool>) {
    loop {
        let mut message = vec![0; 5];
        if from.read_exact(&mut message).await.is_err() {
            return;
        }
        let length = u32::from_be_bytes([message[1], message[2], message[3], message[4]]);
        message.resize(1 + length as usize, 0);
        if from.read_exact(&mut message[5..]).await.is_err() {
            return;
        }
        let is_lost = message[0] == NOTIFICATION && swallows.load(Ordering::SeqCst);
        if !is_lost && to.write_all(&message).await.is_err() {
            return;
        }
    }
}
