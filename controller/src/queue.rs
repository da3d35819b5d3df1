//! A work queue: keys wait until a worker is free, one key is never worked on twice at the same time, and what changes
//! while it is worked on is worked on again. Nothing is gathered or delayed: a pass begins as soon as it can.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::future::Future;
use std::hash::Hash;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// When a pass that panicked is made again.
const BROKEN: Duration = Duration::from_secs(60);

/// Keys that are to be looked at.
pub(crate) struct Queue<K> {
    state: Mutex<State<K>>,
    wake: Notify,
}

struct State<K> {
    ready: VecDeque<K>,
    queued: HashSet<K>,
    /// What is worked on now; `true`: it changed meanwhile.
    running: HashMap<K, bool>,
    timers: BTreeMap<(Instant, u64), K>,
    due: HashMap<K, (Instant, u64)>,
    counter: u64,
}

impl<K: Clone + Eq + Hash + Send + 'static> Queue<K> {
    /// Nothing to do yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                ready: VecDeque::new(),
                queued: HashSet::new(),
                running: HashMap::new(),
                timers: BTreeMap::new(),
                due: HashMap::new(),
                counter: 0,
            }),
            wake: Notify::new(),
        })
    }

    /// Has a key looked at as soon as possible. Returns whether it is being looked at right now.
    pub fn add(&self, key: K) -> bool {
        let mut state = self.lock();
        let running = state.add(key);
        drop(state);
        self.wake.notify_one();
        running
    }

    /// How many keys wait for a worker.
    pub fn depth(&self) -> usize {
        self.lock().ready.len()
    }

    /// Works on keys until dropped, at most `workers` at the same time. A pass says when to look again by itself.
    pub async fn run<F>(self: Arc<Self>, workers: usize, pass: impl Fn(K) -> F)
    where
        F: Future<Output = Option<Duration>> + Send + 'static,
    {
        let mut passes: JoinSet<(K, Option<Duration>)> = JoinSet::new();
        loop {
            let next_timer = {
                let mut state = self.lock();
                state.expire(Instant::now());
                while passes.len() < workers {
                    let Some(key) = state.begin() else { break };
                    let work = pass(key.clone());
                    passes.spawn(async move { (key, kept_alive(work).await) });
                }
                state.timers.keys().next().map(|(at, _)| *at)
            };
            tokio::select! {
                () = self.wake.notified() => {}
                () = sleep_until(next_timer.unwrap_or_else(Instant::now)), if next_timer.is_some() => {}
                Some(done) = passes.join_next(), if !passes.is_empty() => match done {
                    Ok((key, again)) => self.lock().end(key, again),
                    // cannot happen: panics are caught, and nobody aborts a single pass
                    Err(error) => tracing::error!(%error, "a pass was lost"),
                },
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pass that panics is a defect, which must not keep its key from ever being looked at again.
async fn kept_alive(pass: impl Future<Output = Option<Duration>>) -> Option<Duration> {
    AssertUnwindSafe(pass).catch_unwind().await.unwrap_or_else(|_| {
        tracing::error!("a pass broke off; made again in a minute");
        Some(BROKEN)
    })
}

impl<K: Clone + Eq + Hash> State<K> {
    fn add(&mut self, key: K) -> bool {
        if let Some(again) = self.running.get_mut(&key) {
            *again = true;
            return true;
        }
        if self.queued.insert(key.clone()) {
            self.forget_timer(&key);
            self.ready.push_back(key);
        }
        false
    }

    fn begin(&mut self) -> Option<K> {
        let key = self.ready.pop_front()?;
        self.queued.remove(&key);
        self.forget_timer(&key);
        self.running.insert(key.clone(), false);
        Some(key)
    }

    fn end(&mut self, key: K, again: Option<Duration>) {
        let changed = self.running.remove(&key).unwrap_or(false);
        match again {
            _ if changed => {
                self.add(key);
            }
            Some(after) => {
                let at = (Instant::now() + after, self.counter);
                self.counter += 1;
                self.forget_timer(&key);
                self.timers.insert(at, key.clone());
                self.due.insert(key, at);
            }
            None => {}
        }
    }

    fn expire(&mut self, now: Instant) {
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > now {
                return;
            }
            let key = entry.remove();
            self.due.remove(&key);
            self.add(key);
        }
    }

    fn forget_timer(&mut self, key: &K) {
        if let Some(at) = self.due.remove(key) {
            self.timers.remove(&at);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_that_changes_while_it_is_worked_on_is_worked_on_again_and_never_twice_at_once() {
        let queue: Arc<Queue<&str>> = Queue::new();
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (said, mut heard) = mpsc::unbounded_channel();
        let work = {
            let (now, most) = (now.clone(), most.clone());
            move |key: &'static str| {
                let (now, most, said) = (now.clone(), most.clone(), said.clone());
                async move {
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    let _ = said.send(key);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    now.fetch_sub(1, Ordering::SeqCst);
                    None
                }
            }
        };
        let running = tokio::spawn(queue.clone().run(8, work));
        queue.add("a");
        assert_eq!(heard.recv().await, Some("a"));
        assert!(queue.add("a"), "it is being worked on");
        assert!(queue.add("a"));
        assert_eq!(heard.recv().await, Some("a"));
        assert_eq!(most.load(Ordering::SeqCst), 1);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(
            heard.try_recv().is_err(),
            "two changes during one pass are one further pass"
        );
        running.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_pass_can_ask_for_the_next_look_and_a_change_comes_before_it() {
        let queue: Arc<Queue<u8>> = Queue::new();
        let (said, mut heard) = mpsc::unbounded_channel();
        let work = move |key: u8| {
            let _ = said.send((key, Instant::now()));
            async move { Some(Duration::from_secs(60)) }
        };
        let running = tokio::spawn(queue.clone().run(1, work));
        queue.add(1);
        let first = heard.recv().await.unwrap().1;
        tokio::time::sleep(Duration::from_secs(10)).await;
        queue.add(1);
        let second = heard.recv().await.unwrap().1;
        assert_eq!(second - first, Duration::from_secs(10));
        let third = heard.recv().await.unwrap().1;
        assert_eq!((third - second).as_secs(), 60, "the old timer is gone");
        running.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_pass_that_panics_is_made_again_later() {
        let queue: Arc<Queue<u8>> = Queue::new();
        let (said, mut heard) = mpsc::unbounded_channel();
        let work = move |_| {
            let said = said.clone();
            async move {
                let _ = said.send(Instant::now());
                panic!("a defect")
            }
        };
        let running = tokio::spawn(queue.clone().run(1, work));
        queue.add(1);
        let (first, second) = (heard.recv().await.unwrap(), heard.recv().await.unwrap());
        assert_eq!((second - first).as_secs(), BROKEN.as_secs());
        running.abort();
    }
}
