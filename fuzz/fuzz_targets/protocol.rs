//! Any bytes as packets of either side, as a catalog and a plan that a daemon tells, and as a client's control page.
#![no_main]

use flea::engine::Board;
use flea::mem::PoolFile;
use flea::model::records;
use flea::proto::message::{self, Request};
use flea::proto::plan::{ClientPlan, Figures, Placed};
use libfuzzer_sys::fuzz_target;
use std::time::Instant;

const LAYERS: u32 = 8;

fuzz_target!(|bytes: &[u8]| {
    request(bytes);
    let _ = message::parse_reply(bytes);
    told(bytes);
    page(bytes);
});

fn request(bytes: &[u8]) {
    let Ok(request) = Request::parse(bytes) else {
        return;
    };
    let _ = request.parameters::<message::Hello>();
    let _ = request.parameters::<message::Load>();
    let _ = request.parameters::<message::Named>();
    let _ = request.parameters::<message::Budget>();
    let _ = request.parameters::<message::Page>();
    let _ = request.parameters::<message::Attach>();
    let _ = request.parameters::<message::Failure>();
    let _ = request.parameters::<message::Hint>();
    let _ = request.parameters::<message::Nothing>();
}

/// Rows and runs, one per line.
fn told(bytes: &[u8]) {
    let lines = || bytes.split(|byte| *byte == b'\n');
    let rows = lines().filter_map(|line| serde_json::from_slice::<records::Record>(line).ok());
    let Ok(catalog) = records::catalog(rows) else {
        return;
    };
    let runs: Vec<Placed> = lines()
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect();
    let null = std::fs::File::open("/dev/null").expect("null");
    let pool = PoolFile::new(null.into()).expect("a file");
    let figures = Figures {
        page_bytes: 4096,
        ..Figures::default()
    };
    let Ok(plan) = ClientPlan::new(figures, pool, runs, catalog.layers.len()) else {
        return;
    };
    for (layer, entry) in (0u32..).zip(&catalog.layers) {
        let _ = plan.resident_pieces(&catalog, layer, |run, _| {
            assert!(run.page_count > 0);
            Ok(())
        });
        for slot in [0, 1, u32::MAX] {
            let streamed = plan.streamed(layer, slot);
            assert!(plan.streams(layer) || matches!(streamed, Ok(None)));
        }
        for used in &entry.uses {
            let extent = used.extent;
            let _ = plan.needs(
                layer,
                extent.shard_index,
                extent.offset_bytes,
                extent.end_bytes(),
            );
        }
    }
}

fn page(bytes: &[u8]) {
    let board = Board::new(LAYERS, 2).expect("a board");
    let page = board.attach(1).expect("a page");
    let words = bytes.chunks_exact(4).take(page.count());
    for (index, word) in words.enumerate() {
        page.store(
            index,
            u32::from_le_bytes(word.try_into().expect("four bytes")),
        );
    }
    let mut wanted = Vec::new();
    for _ in 0..3 {
        board.listen(Instant::now(), |layer| layer % 2 == 0, &mut wanted);
    }
    assert!(wanted.len() <= 6 && wanted.iter().all(|layer| *layer < LAYERS));
    board.answer_failure(LAYERS - 1);
    assert!(board.leases(1).len() <= LAYERS as usize);
    board.detach(1);
    assert!(board.clients().is_empty() && (0..LAYERS).all(|layer| !board.held(layer)));
}
