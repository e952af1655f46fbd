//! What clients say and what they are told, word by word.

use super::*;

#[test]
fn a_hold_is_seen_until_its_client_is_gone() {
    let board = Board::new(4, 2).unwrap();
    let page = board.attach(1).unwrap();
    let before = Instant::now();
    assert!(board.holding(before).is_empty());
    page.add(place::hold(2), 1);
    assert!(board.held(2) && !board.held(1));
    assert_eq!(board.holding(before), [1]);
    let late = board.attach(2).unwrap();
    late.add(place::hold(1), 1);
    assert_eq!(
        board.holding(before),
        [1],
        "who came later has no lease yet"
    );
    assert_eq!(board.holding(Instant::now()), [1, 2]);
    board.detach(2);
    assert_eq!(board.holders(2), [1]);
    assert_eq!(board.leases(1), [(2, 1)]);
    assert_eq!(board.told()[&1], (1, None, 0));
    board.detach(1);
    assert!(board.holding(Instant::now()).is_empty());
}

#[test]
fn garbage_in_a_page_is_bounded() {
    let board = Board::new(8, 2).unwrap();
    let page = board.attach(1).unwrap();
    for index in 0..page.count() {
        page.store(index, 0xdead_beef);
    }
    let mut wanted = Vec::new();
    board.listen(Instant::now(), |_| false, &mut wanted);
    assert_eq!(wanted.len(), 2, "no more waits than a client may have");
    assert_eq!(board.leases(1).len(), 8);
    page.store(place::RING_HEAD, 0);
    board.listen(Instant::now(), |_| false, &mut wanted);
    assert!(board.clients()[0].layer.is_none(), "no layer 0xdeadbeef");
}

#[test]
fn the_ring_teaches_the_order_even_when_it_has_gone_round() {
    let board = Board::new(4, 2).unwrap();
    let page = board.attach(1).unwrap();
    let mut head = 0u32;
    let mut acquire = |layer: u32| {
        page.store(place::RING + head as usize % place::RING_COUNT, layer);
        head += 1;
        page.store(place::RING_HEAD, head);
    };
    for _ in 0..200 {
        for layer in [0, 2, 1, 3] {
            acquire(layer);
        }
    }
    let mut wanted = Vec::new();
    board.listen(Instant::now(), |_| false, &mut wanted);
    let mut clients = board.clients();
    assert_eq!(clients[0].acquires, 800);
    assert_eq!(clients[0].order.look_ahead(), [0, 2, 1, 3]);
}

#[test]
fn what_a_client_took_just_before_it_went_is_counted() {
    let board = Board::new(4, 2).unwrap();
    let page = board.attach(1).unwrap();
    page.store(place::RING_HEAD, 3);
    board.detach(1);
    assert_eq!(board.acquires(), 3);
}

#[test]
fn a_failure_answers_the_waits_before_it_and_none_after() {
    let board = Board::new(2, 2).unwrap();
    let page = board.attach(1).unwrap();
    page.add(place::want(1), WANT);
    let ask = || {
        let mut wanted = Vec::new();
        board.listen(Instant::now(), |layer| layer == 1, &mut wanted);
        wanted
    };
    assert_eq!(ask(), [1]);
    board.answer_failure(1);
    assert!(ask().is_empty(), "one read for one question");
    page.sub(place::want(1), 1);
    page.add(place::want(1), WANT);
    assert_eq!(ask(), [1]);
}

#[test]
fn a_change_of_state_is_always_another_word() {
    let board = Board::new(1, 1).unwrap();
    let state = || board.area().load(place::state(0));
    board.show(0, READY, 3);
    let first = state();
    assert_eq!(first % CHANGE, READY);
    board.show(0, READY, 3);
    assert_eq!(state(), first);
    board.show(0, 0, 0);
    board.show(0, READY, 3);
    assert_ne!(state(), first);
}
