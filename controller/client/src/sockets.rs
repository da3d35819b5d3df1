//! The websockets of a migration's end that waits, for a relay: after the handshake the bytes of the server's frames come
//! out as they are, and what goes in is the frames of another server, which are masked on the way (a client must). Nothing
//! is put together, so any frame and any message passes in constant memory, empty ones, pings and closes included.

use std::io::Cursor;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use berth_core::server::{Channel, FailureKind, Result, ServerError, Socket};
use futures::Sink;
use futures::stream::{self, StreamExt};
use reqwest::Url;
use reqwest::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use secrecy::{ExposeSecret, SecretString};
use tokio::io::{AsyncReadExt, AsyncWrite, ReadHalf, WriteHalf};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;

use crate::failure::{Cut, Refusal};
use crate::http::{Call, HttpServer};
use crate::observe::{RequestClass, RequestRecord};
use crate::path;

/// For connection and handshake: the servers wait for all sockets of an end for only ten seconds.
const OPEN: Duration = Duration::from_secs(8);
/// Largest piece that is read at once.
const PIECE: usize = 64 << 10;
/// Longest header of a frame from a server: two bytes and a length of eight.
const HEADER: usize = 10;

impl HttpServer {
    /// Opens one socket of the end that waits. A secret serves once, and the daemon of LXD 5.0 dies of a second connection
    /// with it (close of closed channel): what may have been sent is never sent again.
    pub(crate) async fn open_channel(&self, waiting: &Channel, name: &str) -> Result<Socket> {
        let path = format!("/1.0/operations/{}/websocket", path::encode(&waiting.operation.0));
        let call = Call::get(
            RequestClass::Channel,
            path,
            format!("open channel {name} of a transfer"),
        );
        let Some(secret) = waiting.secrets.get(name) else {
            return Err(self.error(
                &call,
                FailureKind::Protocol,
                "the other end has a channel that this one lacks",
            ));
        };
        let mut failure = None;
        for (index, address) in self.in_turn() {
            let opened = timeout(OPEN, self.shake_hands(address, &call.path, secret)).await;
            match opened.unwrap_or_else(|_| Err(Refusal::Cut(Cut::late_connection()))) {
                Ok(upgraded) => {
                    self.use_address(index);
                    let attempted = format!("relay channel {name} of {}", self.address_in_use());
                    return Ok(socket(upgraded, &attempted));
                }
                Err(Refusal::Answer(code, text)) => return Err(self.refusal(&call, code, text).await),
                Err(Refusal::Cut(cut)) if cut.unsent => failure = failure.or(Some(cut)),
                Err(Refusal::Cut(cut)) => return Err(self.error(&call, cut.kind, cut.message)),
            }
        }
        let cut = failure.unwrap_or_else(Cut::late_connection);
        Err(self.error(&call, cut.kind, cut.message))
    }

    async fn shake_hands(
        &self,
        address: &Url,
        path: &str,
        secret: &SecretString,
    ) -> std::result::Result<reqwest::Upgraded, Refusal> {
        let secret = path::with_query(path.to_owned(), "secret", secret.expose_secret());
        let url = address.join(&secret).map_err(|e| Cut::while_connecting(&e))?;
        let (key, started) = (generate_key(), Instant::now());
        let request = self
            .plain_get(url)
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "websocket");
        let request = request
            .header(SEC_WEBSOCKET_VERSION, "13")
            .header(SEC_WEBSOCKET_KEY, &key);
        let answer = request.send().await.map_err(Cut::of_http)?;
        let status = answer.status().as_u16();
        if let Some(observer) = self.observer() {
            observer(RequestRecord {
                method: "GET",
                class: RequestClass::Channel,
                status: Some(status),
                duration: started.elapsed(),
                bytes: 0,
            });
        }
        if status != 101 {
            let body: serde_json::Value = answer.json().await.unwrap_or_default();
            let text = body["error"].as_str().unwrap_or("no reason given").to_owned();
            return Err(Refusal::Answer(status, text));
        }
        let accepted = answer.headers().get(SEC_WEBSOCKET_ACCEPT).and_then(|v| v.to_str().ok());
        if accepted != Some(derive_accept_key(key.as_bytes()).as_str()) {
            return Err(Refusal::Answer(
                status,
                "the answer is not that of a websocket".to_owned(),
            ));
        }
        Ok(answer.upgrade().await.map_err(Cut::of_http)?)
    }
}

fn socket(upgraded: reqwest::Upgraded, attempted: &str) -> Socket {
    let (reading, writing) = tokio::io::split(upgraded);
    let broken = attempted.to_owned();
    let incoming = stream::try_unfold(reading, move |reading| next_piece(reading, broken.clone())).boxed();
    let outgoing = Outgoing {
        writing,
        frames: Frames::default(),
        pending: Vec::new(),
        written: 0,
        attempted: attempted.to_owned(),
    };
    Socket {
        incoming,
        outgoing: Box::pin(outgoing),
    }
}

type Reading = ReadHalf<reqwest::Upgraded>;

async fn next_piece(mut reading: Reading, attempted: String) -> Result<Option<(Vec<u8>, Reading)>> {
    let mut piece = Vec::with_capacity(PIECE);
    match reading.read_buf(&mut piece).await {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some((piece, reading))),
        Err(e) => Err(ServerError::new(FailureKind::Unknown, attempted, e.to_string())),
    }
}

/// The half that is written. A piece is taken only when the one before has gone out, so nothing piles up here.
struct Outgoing {
    writing: WriteHalf<reqwest::Upgraded>,
    frames: Frames,
    pending: Vec<u8>,
    written: usize,
    attempted: String,
}

impl Outgoing {
    fn drain(&mut self, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        while self.written < self.pending.len() {
            let rest = &self.pending[self.written..];
            let n = ready!(Pin::new(&mut self.writing).poll_write(context, rest))?;
            if n == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
        }
        self.pending.clear();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    fn told(&self, done: Poll<std::io::Result<()>>) -> Poll<Result<()>> {
        done.map_err(|e| ServerError::new(FailureKind::Unknown, &self.attempted, e.to_string()))
    }
}

impl Sink<Vec<u8>> for Outgoing {
    type Error = ServerError;

    fn poll_ready(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let done = self.drain(context);
        self.told(done)
    }

    fn start_send(mut self: Pin<&mut Self>, piece: Vec<u8>) -> Result<()> {
        let this = &mut *self;
        let masked = this.frames.mask(&piece, &mut this.pending);
        masked.map_err(|why| ServerError::new(FailureKind::Protocol, &this.attempted, why))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let done = match ready!(self.drain(context)) {
            Ok(()) => Pin::new(&mut self.writing).poll_flush(context),
            Err(e) => Poll::Ready(Err(e)),
        };
        self.told(done)
    }

    fn poll_close(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let done = match ready!(self.drain(context)) {
            Ok(()) => Pin::new(&mut self.writing).poll_shutdown(context),
            Err(e) => Poll::Ready(Err(e)),
        };
        self.told(done)
    }
}

/// Where in a server's frames the pieces are: a header may be cut in two, a payload into any number of pieces.
#[derive(Default)]
struct Frames {
    /// The part of a header that has come.
    header: Vec<u8>,
    /// Bytes of the payload that have not come yet.
    rest: u64,
    mask: [u8; 4],
    /// Where in the mask the next byte is.
    turn: usize,
}

impl Frames {
    /// Appends `piece` as a client sends it.
    fn mask(&mut self, mut piece: &[u8], out: &mut Vec<u8>) -> std::result::Result<(), String> {
        out.reserve(piece.len() + HEADER);
        while !piece.is_empty() {
            if self.rest == 0 {
                piece = self.read_header(piece, out)?;
                continue;
            }
            let (now, later) = piece.split_at(piece.len().min(usize::try_from(self.rest).unwrap_or(usize::MAX)));
            self.payload(now, out);
            piece = later;
        }
        Ok(())
    }

    fn payload(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut mask = self.mask;
        mask.rotate_left(self.turn);
        let from = out.len();
        out.extend_from_slice(bytes);
        let (fours, rest) = out[from..].as_chunks_mut::<4>();
        let whole = u32::from_ne_bytes(mask);
        for four in fours {
            *four = (u32::from_ne_bytes(*four) ^ whole).to_ne_bytes();
        }
        rest.iter_mut().zip(mask).for_each(|(b, m)| *b ^= m);
        self.turn = (self.turn + bytes.len()) % 4;
        self.rest -= bytes.len() as u64;
    }

    /// Reads on in a header, and says what is left of `piece`.
    fn read_header<'a>(&mut self, piece: &'a [u8], out: &mut Vec<u8>) -> std::result::Result<&'a [u8], String> {
        let had = self.header.len();
        self.header.extend(piece.iter().take(HEADER - had));
        let mut cursor = Cursor::new(&self.header);
        let parsed = FrameHeader::parse(&mut cursor).map_err(|e| e.to_string())?;
        let Some((mut header, length)) = parsed else {
            let taken = self.header.len() - had;
            return match taken {
                0 => Err("a frame without end of its header".to_owned()),
                _ => Ok(&piece[taken..]),
            };
        };
        if header.mask.is_some() {
            return Err("a server must not mask its frames".to_owned());
        }
        let used = usize::try_from(cursor.position()).unwrap_or(HEADER) - had;
        let random: [u8; 4] = rand::random();
        header.mask = Some(random);
        header.format(length, out).map_err(|e| e.to_string())?;
        (self.mask, self.turn, self.rest) = (random, 0, length);
        self.header.clear();
        Ok(&piece[used..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes masked frames apart: opcode and final bit, and payload.
    fn read(mut wire: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut frames = Vec::new();
        while !wire.is_empty() {
            let mut cursor = Cursor::new(wire);
            let (header, length) = FrameHeader::parse(&mut cursor)
                .expect("a header")
                .expect("a whole header");
            let begin = usize::try_from(cursor.position()).expect("it is short");
            let mask = header.mask.expect("a client masks");
            let (payload, later) = wire[begin..].split_at(usize::try_from(length).expect("it is short"));
            let plain = payload.iter().enumerate().map(|(n, b)| b ^ mask[n % 4]).collect();
            frames.push((wire[0], plain));
            wire = later;
        }
        frames
    }

    #[test]
    fn frames_keep_their_boundaries_types_and_content_wherever_the_pieces_are_cut() {
        let long = vec![7_u8; 70_000];
        let plain: Vec<(u8, Vec<u8>)> = vec![
            (0x81, Vec::new()),
            (0x02, b"part".to_vec()),
            (0x89, b"ping".to_vec()),
            (0x80, vec![1; 300]),
            (0x82, long),
            (0x81, Vec::new()),
            (0x88, vec![3, 232]),
        ];
        let mut wire = Vec::new();
        for (first, payload) in &plain {
            wire.push(*first);
            match payload.len() {
                n @ 0..126 => wire.push(u8::try_from(n).expect("it is short")),
                n @ 126..65536 => {
                    wire.push(126);
                    wire.extend(u16::try_from(n).expect("it fits").to_be_bytes());
                }
                n => {
                    wire.push(127);
                    wire.extend((n as u64).to_be_bytes());
                }
            }
            wire.extend(payload);
        }
        for size in [1, 2, 3, 5, 7, 11, 100, 4096, wire.len()] {
            let (mut frames, mut out) = (Frames::default(), Vec::new());
            for piece in wire.chunks(size) {
                frames.mask(piece, &mut out).expect("these are frames");
            }
            assert!(read(&out) == plain, "pieces of {size}");
        }
    }

    #[test]
    fn what_no_server_says_is_refused() {
        for wrong in [&[0x81, 0x80, 1, 2, 3, 4, 5, 6, 7, 8, 9][..], &[0x8f, 0][..]] {
            let (mut frames, mut out) = (Frames::default(), Vec::new());
            assert!(frames.mask(wrong, &mut out).is_err(), "{wrong:?}");
        }
    }
}
