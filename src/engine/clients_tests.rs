//! Clients of the daemon against one another: what each costs the drive, and what a slot that is kept costs the others.

use super::*;
use crate::engine::state::{Need, Outcome, State, tests::layout};
use std::time::Duration;

const LAYERS: u32 = 12;
const SLOTS: u32 = 4;

/// A model in a daemon whose drive answers at once.
struct Daemon {
    board: Arc<Board>,
    state: State,
    /// Layers whose transient runs were read, in order.
    loads: Vec<u32>,
}

impl Daemon {
    fn new() -> Self {
        let board = Arc::new(Board::new(LAYERS, SLOTS as usize - 2).unwrap());
        board.set_gate(GATE_OPEN);
        // What a re-read costs is told in time, and this drive takes none.
        board.again().not_before = Instant::now() + Duration::from_secs(3600);
        Self {
            state: State::new(layout(LAYERS, SLOTS, 1, true), Some(Arc::clone(&board))),
            board,
            loads: Vec::new(),
        }
    }

    fn client(&self, id: u64) -> Client {
        Client {
            id,
            page: self.board.attach(id).unwrap(),
            waits_for: None,
            had: 0,
        }
    }

    /// Reads all that there is to read.
    fn read(&mut self) {
        while let Some(job) = self.state.pick() {
            if job.slot.is_some() {
                self.loads.push(job.fetch / 2);
            }
            if self.state.completed(job.fetch, 0, Ok(()), true) == Outcome::Complete {
                self.state.published(job.fetch);
            }
        }
    }

    /// Whoever has only come by now does not count as getting on for having come.
    fn settle(&mut self) {
        std::thread::sleep(Duration::from_millis(60));
        self.read();
    }

    fn loads_of(&self, layer: u32) -> usize {
        self.loads.iter().filter(|load| **load == layer).count()
    }

    fn slot_shown(&self, layer: u32) -> u32 {
        self.board.area.load(place::slot(layer, LAYERS))
    }
}

/// The other end of a page: what docs/protocol.md tells a client to do.
struct Client {
    id: u64,
    page: Arc<SharedWords>,
    waits_for: Option<u32>,
    had: usize,
}

impl Client {
    /// Holds the layer, or says that it waits for it.
    fn acquire(&mut self, daemon: &Daemon, layer: u32) -> bool {
        self.page.add(place::hold(layer), 1);
        if daemon.board.area.load(place::state(layer)) & READY == 0 {
            self.page.sub(place::hold(layer), 1);
            if self.waits_for != Some(layer) {
                self.give_up();
                self.waits_for = Some(layer);
                self.page.add(place::want(layer), WANT);
            }
            return false;
        }
        self.give_up();
        let head = self.page.load(place::RING_HEAD);
        self.page
            .store(place::RING + head as usize % place::RING_COUNT, layer);
        self.page.store(place::RING_HEAD, head.wrapping_add(1));
        self.had += 1;
        true
    }

    fn give_up(&mut self) {
        if let Some(layer) = self.waits_for.take() {
            self.page.sub(place::want(layer), 1);
        }
    }

    fn release(&self, layer: u32) {
        self.page.sub(place::hold(layer), 1);
    }

    /// Acquires and releases the layer if it is there.
    fn touch(&mut self, daemon: &Daemon, layer: u32) -> bool {
        let had = self.acquire(daemon, layer);
        if had {
            self.release(layer);
        }
        had
    }

    /// Touches the layer, however long that takes.
    fn fetch(&mut self, daemon: &mut Daemon, layer: u32) {
        let began = Instant::now();
        while !self.touch(daemon, layer) {
            daemon.read();
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "layer {layer} does not come"
            );
        }
        daemon.read();
    }
}

#[test]
fn who_asks_again_and_again_is_read_for_once_a_pass() {
    let mut daemon = Daemon::new();
    let (mut honest, mut spinner) = (daemon.client(1), daemon.client(2));
    let mut pass = |daemon: &mut Daemon, honest: &mut Client| {
        let before = daemon.loads.len();
        for layer in 0..LAYERS {
            honest.fetch(daemon, layer);
            for _ in 0..3 {
                spinner.touch(daemon, 0);
                daemon.read();
            }
        }
        daemon.loads.len() - before
    };
    daemon.settle();
    pass(&mut daemon, &mut honest);
    let before = (daemon.loads_of(0), daemon.board.put_off());
    let passes = 8;
    for _ in 0..passes {
        let loads = pass(&mut daemon, &mut honest);
        assert!(
            loads <= LAYERS as usize + 1,
            "{:?}",
            &daemon.loads[daemon.loads.len() - loads..]
        );
    }
    let of_layer = daemon.loads_of(0) - before.0;
    assert!(
        (passes..=passes + 1).contains(&of_layer),
        "layer 0 was read {of_layer} times in {passes} passes"
    );
    assert!(daemon.board.put_off() > before.1, "it was put off");
    assert!(spinner.had >= passes, "and had its layer in every pass");
}

#[test]
fn a_page_that_tells_no_acquires_gains_nothing() {
    let mut daemon = Daemon::new();
    let (mut honest, liar) = (daemon.client(1), daemon.client(2));
    liar.page.add(place::want(0), WANT);
    daemon.settle();
    let before = daemon.loads.len();
    for _ in 0..8 {
        for layer in 0..LAYERS {
            honest.fetch(&mut daemon, layer);
        }
    }
    let loads = daemon.loads.len() - before;
    assert!(loads <= 9 * LAYERS as usize, "{loads} loads in 8 passes");
}

#[test]
fn alone_everything_is_served_at_once() {
    let mut daemon = Daemon::new();
    let (mut one, mut idle) = (daemon.client(1), daemon.client(2));
    idle.fetch(&mut daemon, 3);
    daemon.settle();
    assert_eq!(daemon.state.look_again(), None);
    for _ in 0..20 {
        for layer in [0, SLOTS] {
            if !one.touch(&daemon, layer) {
                daemon.read();
                assert!(one.touch(&daemon, layer), "layer {layer}");
            }
            daemon.read();
        }
    }
    assert_eq!(daemon.board.put_off(), 0);
}

#[test]
fn who_stays_at_a_layer_keeps_it_while_nobody_else_gets_on() {
    let mut daemon = Daemon::new();
    let (mut idle, mut spinner) = (daemon.client(1), daemon.client(2));
    for layer in 0..6 {
        idle.fetch(&mut daemon, layer);
    }
    daemon.settle();
    spinner.fetch(&mut daemon, 0);
    std::thread::sleep(Duration::from_millis(150));
    spinner.fetch(&mut daemon, 0);
    let before = daemon.loads.len();
    for _ in 0..100 {
        assert!(spinner.touch(&daemon, 0));
        daemon.read();
    }
    assert_eq!(daemon.loads[before..], [0u32; 0], "nothing has to be read");
}

#[test]
fn clients_that_walk_are_never_put_off() {
    for lead in [0, 1, 5] {
        let mut daemon = Daemon::new();
        let (mut first, mut second) = (daemon.client(1), daemon.client(2));
        for layer in 0..lead {
            first.fetch(&mut daemon, layer);
        }
        let before = daemon.loads.len();
        for step in 0..6 * LAYERS {
            first.fetch(&mut daemon, (lead + step) % LAYERS);
            second.fetch(&mut daemon, step % LAYERS);
        }
        assert_eq!(daemon.board.put_off(), 0, "{lead} layers ahead");
        let loads = daemon.loads.len() - before;
        assert!(
            lead > 1 || loads <= (6 * LAYERS + SLOTS) as usize,
            "{lead} layers ahead: {loads} loads"
        );
    }
}

#[test]
fn who_keeps_his_layers_is_passed_by_and_is_the_only_one_overdue() {
    let mut daemon = Daemon::new();
    let (mut honest, mut miser) = (daemon.client(1), daemon.client(2));
    for layer in 0..LAYERS {
        honest.fetch(&mut daemon, layer);
    }
    for layer in [0, 1] {
        while !miser.acquire(&daemon, layer) {
            daemon.read();
        }
    }
    let before = daemon.board.away();
    for _ in 0..3 {
        for layer in 0..LAYERS {
            honest.fetch(&mut daemon, layer);
            let slot = daemon.slot_shown(layer);
            assert_eq!(slot < 2, layer < 2, "layer {layer} in slot {slot}");
        }
    }
    let away = daemon.board.away() - before;
    assert!(away >= 8, "{away} loads into other slots");
    assert_eq!(miser.had, 2);
    // The honest one shares what the miser keeps, and is not taken for him.
    assert!(honest.acquire(&daemon, 0));
    daemon.read();
    honest.release(0);
    daemon.read();
    let overdue = daemon.state.overdue(Duration::from_millis(1));
    assert!(
        !overdue.is_empty() && overdue.iter().all(|id| *id == miser.id),
        "{overdue:?}"
    );
    assert!(daemon.state.overdue(Duration::from_secs(3600)).is_empty());
    daemon.board.detach(miser.id);
    daemon.read();
    for layer in 0..LAYERS {
        honest.fetch(&mut daemon, layer);
    }
    let before = daemon.board.away();
    for layer in 0..LAYERS {
        honest.fetch(&mut daemon, layer);
        assert_eq!(daemon.slot_shown(layer), layer % SLOTS);
    }
    assert_eq!(daemon.board.away(), before, "everybody at home again");
    assert!(daemon.state.overdue(Duration::ZERO).is_empty());
}

#[test]
fn who_is_alone_may_keep_a_layer_for_as_long_as_he_likes() {
    let mut daemon = Daemon::new();
    let mut host = daemon.client(1);
    for layer in 0..LAYERS {
        host.fetch(&mut daemon, layer);
    }
    while !host.acquire(&daemon, 0) {
        daemon.read();
    }
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(15));
        daemon.read();
    }
    assert!(daemon.state.overdue(Duration::ZERO).is_empty());
    assert!(daemon.state.ready(0, Need::Whole));
    assert_eq!(
        daemon.board.area.load(place::state(0)) & READY,
        READY,
        "nobody else wants it: it stays open"
    );
}

/// Whatever clients do: what is held stays where it is, and everybody who walks gets on.
#[test]
fn what_is_held_never_moves() {
    let mut seed = 0x5eed_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    let mut daemon = Daemon::new();
    let mut clients: Vec<Client> = (1..=4).map(|id| daemon.client(id)).collect();
    // Per client: the layer it holds, the slot it saw, and the layer it is at.
    let mut held: Vec<Option<(u32, u32)>> = vec![None; clients.len()];
    let mut at = vec![0u32; clients.len()];
    for step in 0..60_000u32 {
        let index = random(clients.len() as u64) as usize;
        let client = &mut clients[index];
        match held[index] {
            Some((layer, _)) if random(40) < [20, 20, 10, 1][index] => {
                client.release(layer);
                held[index] = None;
                // Two walk, one goes to and fro, one keeps what it has and jumps.
                at[index] = match index {
                    0 | 1 => (layer + 1) % LAYERS,
                    2 => layer ^ 4,
                    _ => random(u64::from(LAYERS)) as u32,
                } % LAYERS;
            }
            Some(_) => {}
            None if client.acquire(&daemon, at[index]) => {
                held[index] = Some((at[index], daemon.slot_shown(at[index])));
            }
            None => {}
        }
        if random(3) == 0
            && let Some(job) = daemon.state.pick()
            && daemon.state.completed(job.fetch, 0, Ok(()), true) == Outcome::Complete
        {
            daemon.state.published(job.fetch);
        }
        if step % 4000 == 0 {
            std::thread::sleep(Duration::from_millis(60));
        }
        for (layer, slot) in held.iter().flatten() {
            assert!(daemon.state.ready(*layer, Need::Whole), "step {step}");
            assert_eq!(daemon.slot_shown(*layer), *slot, "layer {layer} was moved");
        }
    }
    for client in &clients {
        assert!(client.had > 20, "client {} had {}", client.id, client.had);
    }
}
