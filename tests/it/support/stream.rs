//! A client of `/v1/stream` that sees every frame as it is on the wire.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::Value;

/// How long a frame may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// One block of a stream.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Block {
    pub(crate) id: Option<u64>,
    pub(crate) name: String,
    pub(crate) data: Option<String>,
    pub(crate) comment: bool,
    pub(crate) retry: Option<u64>,
}

impl Block {
    fn parse(text: &str) -> Self {
        let mut block = Self::default();
        for line in text.trim_end().lines() {
            let (name, value) = line.split_once(':').unwrap();
            let value = value.strip_prefix(' ').unwrap_or(value);
            match name {
                "" => block.comment = true,
                "id" => block.id = Some(value.parse().unwrap()),
                "event" => block.name = value.to_owned(),
                "retry" => block.retry = Some(value.parse().unwrap()),
                "data" => {
                    let data = block.data.get_or_insert_default();
                    if !data.is_empty() {
                        data.push('\n');
                    }
                    data.push_str(value);
                }
                other => panic!("{other} is no field of a stream: {text}"),
            }
        }
        block
    }

    /// The data.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(self.data.as_deref().unwrap()).unwrap()
    }
}

/// An open stream.
pub(crate) struct Stream {
    answer: reqwest::Response,
    text: Vec<u8>,
    blocks: VecDeque<Block>,
}

impl Stream {
    /// Opens a stream, and sees its first block.
    pub(crate) async fn open(url: &str, query: &str, headers: &[(&str, &str)]) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut request = client.get(format!("{url}/v1/stream{query}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Self { answer, text: Vec::new(), blocks: VecDeque::new() }
    }

    /// A header of the answer.
    pub(crate) fn header(&self, name: &str) -> String {
        self.answer.headers()[name].to_str().unwrap().to_owned()
    }

    /// The next block; `None` once the stream has ended.
    pub(crate) async fn block(&mut self) -> Option<Block> {
        tokio::time::timeout(PATIENCE, self.read()).await.expect("a block comes")
    }

    async fn read(&mut self) -> Option<Block> {
        loop {
            if let Some(block) = self.blocks.pop_front() {
                return Some(block);
            }
            self.text.extend(self.answer.chunk().await.ok()??);
            while let Some(end) = self.text.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = self.text.drain(..end + 2).collect();
                self.blocks.push_back(Block::parse(std::str::from_utf8(&block).unwrap()));
            }
        }
    }

    /// The next block with data.
    pub(crate) async fn frame(&mut self) -> Block {
        loop {
            let block = self.block().await.expect("the stream goes on");
            if block.data.is_some() {
                return block;
            }
        }
    }

    /// The ids of the next frames, which are all events.
    pub(crate) async fn ids(&mut self, count: usize) -> Vec<u64> {
        let mut ids = Vec::new();
        for _ in 0..count {
            let frame = self.frame().await;
            assert_eq!((frame.name.as_str(), frame.json()["seq"].as_u64()), ("", frame.id), "{frame:?}");
            ids.push(frame.id.unwrap());
        }
        ids
    }
}
