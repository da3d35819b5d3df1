//! The scratch folder: where backups are kept on their way from one server to another. A file has no name from the moment
//! it exists, so that nothing is left of it when this process ends, however it ends. What is read is checked against the
//! checksum of what was written before its last piece is given out.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use berth_core::server::{Data, FailureKind, Result, ServerError};
use berth_engine::Scratch;
use futures::StreamExt;
use sha2::{Digest, Sha256};
use tokio::task::spawn_blocking;

use crate::cli::Fatal;

/// What is written and read at once.
const PIECE: usize = 1 << 20;
/// How a file is called before it has no name.
const PREFIX: &str = "berth-scratch-";

/// A folder of which no more than so many bytes are used at the same time.
#[derive(Debug)]
pub(crate) struct Folder {
    dir: PathBuf,
    limit: u64,
    used: Arc<AtomicU64>,
}

impl Folder {
    /// Opens the folder, makes it if need be, and removes what a process before this one may have left.
    pub fn open(dir: &Path, limit: u64) -> std::result::Result<Self, Fatal> {
        let failed = |e: io::Error| Fatal::new(&format!("scratch folder {}", dir.display()), e);
        std::fs::create_dir_all(dir).map_err(failed)?;
        for entry in std::fs::read_dir(dir).map_err(failed)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                std::fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        let folder = Self {
            dir: dir.to_owned(),
            limit,
            used: Arc::default(),
        };
        // better now than in the middle of a move
        folder.file().map_err(failed)?;
        Ok(folder)
    }

    /// A file that is gone when it is closed.
    fn file(&self) -> io::Result<File> {
        let path = self.dir.join(format!("{PREFIX}{:016x}", rand::random::<u64>()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    }

    fn failed(&self, e: &io::Error) -> ServerError {
        let full = matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
        let kind = if full {
            FailureKind::ScratchFull
        } else {
            FailureKind::Unknown
        };
        let attempted = format!(
            "keep a backup in the controller's scratch folder {}",
            self.dir.display()
        );
        ServerError::new(kind, attempted, e.to_string())
    }

    /// Takes that much of the limit.
    fn take(&self, room: &mut Room, bytes: u64) -> Result<()> {
        let used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        room.bytes += bytes;
        if used <= self.limit {
            return Ok(());
        }
        let message = format!(
            "it may hold {} MiB at the same time, and that is too little",
            self.limit >> 20
        );
        Err(self.failed(&io::Error::new(ErrorKind::StorageFull, message)))
    }
}

/// A part of the limit, given back when it is not needed any more.
struct Room {
    used: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[async_trait]
impl Scratch for Folder {
    async fn keep(&self, data: Data) -> Result<Data> {
        let mut room = Room {
            used: self.used.clone(),
            bytes: 0,
        };
        self.take(&mut room, data.size.unwrap_or(0))?;
        let file = self.file().map_err(|e| self.failed(&e))?;
        let (mut state, mut buffer, mut length) = ((file, Sha256::new()), Vec::with_capacity(PIECE), 0_u64);
        let mut bytes = data.bytes;
        while let Some(piece) = bytes.next().await {
            let piece = piece?;
            length += piece.len() as u64;
            if let Some(more) = length.checked_sub(room.bytes).filter(|n| *n > 0) {
                self.take(&mut room, more)?;
            }
            buffer.extend_from_slice(&piece);
            if buffer.len() >= PIECE {
                (state, buffer) = written(state, buffer).await.map_err(|e| self.failed(&e))?;
            }
        }
        let ((file, sum), _) = written(state, buffer).await.map_err(|e| self.failed(&e))?;
        if data.size.is_some_and(|n| n != length) {
            let message = format!("{length} bytes came of {} that were announced", data.size.unwrap_or(0));
            return Err(self.failed(&io::Error::new(ErrorKind::UnexpectedEof, message)));
        }
        tracing::debug!(bytes = length, "a backup is kept");
        Ok(given_back(Kept {
            file,
            left: length,
            expected: sum.finalize().to_vec(),
            sum: Sha256::new(),
            _room: room,
        }))
    }
}

type Writing = (File, Sha256);

async fn written((mut file, mut sum): Writing, mut buffer: Vec<u8>) -> io::Result<(Writing, Vec<u8>)> {
    let done = spawn_blocking(move || {
        file.write_all(&buffer)?;
        sum.update(&buffer);
        buffer.clear();
        Ok(((file, sum), buffer))
    });
    done.await.map_err(io::Error::other)?
}

/// A file on its way out.
struct Kept {
    file: File,
    left: u64,
    expected: Vec<u8>,
    sum: Sha256,
    /// Given back with the file.
    _room: Room,
}

fn given_back(kept: Kept) -> Data {
    let size = kept.left;
    let begun = async move {
        let rewound = spawn_blocking(move || {
            let mut kept = kept;
            kept.file.seek(SeekFrom::Start(0)).map(|_| kept)
        });
        Some(rewound.await.map_err(io::Error::other).flatten())
    };
    let pieces = futures::stream::once(begun)
        .filter_map(|kept| async { kept })
        .flat_map(|kept| match kept {
            Ok(kept) => futures::stream::unfold(Some(kept), next).boxed(),
            Err(e) => futures::stream::iter([Err(unreadable(&e))]).boxed(),
        });
    Data {
        size: Some(size),
        bytes: pieces.boxed(),
    }
}

async fn next(kept: Option<Kept>) -> Option<(Result<Vec<u8>>, Option<Kept>)> {
    let mut kept = kept.filter(|k| k.left > 0)?;
    let read = spawn_blocking(move || {
        let take = usize::try_from(kept.left).unwrap_or(PIECE).min(PIECE);
        let mut piece = vec![0; take];
        kept.file.read_exact(&mut piece)?;
        kept.sum.update(&piece);
        kept.left -= take as u64;
        if kept.left == 0 && std::mem::take(&mut kept.sum).finalize().as_slice() != kept.expected {
            let why = "the backup is not any more what was written: its checksum differs";
            return Err(io::Error::new(ErrorKind::InvalidData, why));
        }
        Ok((piece, kept))
    });
    match read.await.map_err(io::Error::other).flatten() {
        Ok((piece, kept)) => Some((Ok(piece), Some(kept))),
        Err(e) => Some((Err(unreadable(&e)), None)),
    }
}

fn unreadable(e: &io::Error) -> ServerError {
    ServerError::new(
        FailureKind::Unknown,
        "read a backup from the controller's scratch folder",
        e.to_string(),
    )
}

/// Reads `500Mi`, `10Gi`, `10GiB` or a number of bytes.
pub(crate) fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let wrong = || format!("{text:?} is no size such as 500Mi or 10Gi");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.strip_suffix('B').unwrap_or(unit) {
        "" => 0,
        "Ki" => 10,
        "Mi" => 20,
        "Gi" => 30,
        "Ti" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new() -> Self {
            let dir = std::env::temp_dir().join(format!("berth-scratch-test-{:016x}", rand::random::<u64>()));
            std::fs::create_dir_all(&dir).expect("a folder can be made");
            Self(dir)
        }

        fn files(&self) -> usize {
            std::fs::read_dir(&self.0).expect("it is a folder").count()
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn data(size: Option<u64>, bytes: &[u8]) -> Data {
        let pieces: Vec<Result<Vec<u8>>> = bytes.chunks(70_000).map(|c| Ok(c.to_vec())).collect();
        Data {
            size,
            bytes: futures::stream::iter(pieces).boxed(),
        }
    }

    async fn read(data: Data) -> Result<Vec<u8>> {
        let pieces: Vec<Result<Vec<u8>>> = data.bytes.collect().await;
        pieces.into_iter().collect::<Result<Vec<_>>>().map(|p| p.concat())
    }

    #[tokio::test]
    async fn what_is_kept_is_given_back_and_leaves_no_file_and_no_room_taken() {
        let dir = Dir::new();
        let folder = Folder::open(&dir.0, 10 << 20).expect("it can be used");
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        for size in [Some(3_000_000), None] {
            let kept = folder.keep(data(size, &bytes)).await.expect("there is room");
            assert_eq!(dir.files(), 0, "it has no name");
            assert_eq!(kept.size, Some(3_000_000));
            assert!(read(kept).await.expect("it can be read") == bytes);
            assert_eq!(folder.used.load(Ordering::Relaxed), 0);
        }
    }

    #[tokio::test]
    async fn what_does_not_fit_is_refused_and_takes_no_room() {
        let dir = Dir::new();
        let folder = Folder::open(&dir.0, 1 << 20).expect("it can be used");
        let bytes = vec![1; 2 << 20];
        for size in [Some(2 << 20), None] {
            let refused = folder.keep(data(size, &bytes)).await.err().map(|e| e.kind);
            assert_eq!(refused, Some(FailureKind::ScratchFull));
            assert_eq!(folder.used.load(Ordering::Relaxed), 0);
        }
        let short = folder.keep(data(Some(1000), &[0; 999])).await.err().map(|e| e.kind);
        assert_eq!(short, Some(FailureKind::Unknown));
    }

    #[test]
    fn what_an_earlier_process_left_is_removed_at_the_start_and_nothing_else() {
        let dir = Dir::new();
        for name in ["berth-scratch-0123", "mine"] {
            std::fs::write(dir.0.join(name), "x").expect("it can be written");
        }
        Folder::open(&dir.0, 1).expect("it can be used");
        assert_eq!(dir.files(), 1);
    }

    #[test]
    fn a_size_is_a_number_with_a_binary_unit() {
        assert_eq!(parse_size("10Gi"), Ok(10 << 30));
        assert_eq!(parse_size("1MiB"), Ok(1 << 20));
        assert_eq!(parse_size("17"), Ok(17));
        for wrong in ["", "Gi", "10G", "-1", "1.5Gi", "99999999999Ti"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
