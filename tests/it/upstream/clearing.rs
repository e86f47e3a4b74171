//! Waiting until another run has released the thread.

use std::time::Instant;

use futures_util::StreamExt;
use threadkeeper::domain::{Baseline, UpstreamRunId};
use threadkeeper::upstream::{UpstreamError, UpstreamEvent};

use super::scene::{ALL, Flavour, Scene};

/// Starts a run on a busy thread. Returns the run that blocks it, if the upstream names one.
async fn blocking(scene: &mut Scene) -> Option<UpstreamRunId> {
    scene.next_run(Baseline::default());
    match scene.start("x").await.err() {
        Some(UpstreamError::Busy { blocking_run }) => blocking_run,
        other => panic!("the thread is not busy: {other:?}"),
    }
}

#[tokio::test]
async fn own_blocking_run_is_cancelled() {
    let mut scene = Scene::new(Flavour::Assistants).await;
    scene.sim.handle.hold();
    let mut events = scene.start("forgotten").await.unwrap();
    assert!(matches!(
        events.next().await,
        Some(Ok(UpstreamEvent::Accepted(_)))
    ));
    drop(events);
    let blocking = blocking(&mut scene).await.unwrap();
    scene
        .upstream
        .clear(scene.thread.as_ref().unwrap(), Some(&blocking), false)
        .await
        .unwrap();
    assert_eq!(scene.sim.handle.stats().runs_ended["cancelled"], 1);
    scene.sim.handle.release();
    scene.say("next").await;
    // A run that has ended or never existed blocks nothing.
    for run in [&blocking, &UpstreamRunId("run_0".to_owned())] {
        scene
            .upstream
            .clear(scene.thread.as_ref().unwrap(), Some(run), false)
            .await
            .unwrap();
    }
    scene.assert_sound();
}

#[tokio::test]
async fn foreign_blocking_run_is_awaited_or_cancelled() {
    let mut scene = Scene::new(Flavour::Assistants).await;
    let thread = scene.thread.clone().unwrap();
    scene.sim.handle.start_foreign_run(thread.as_str()).unwrap();
    let run = blocking(&mut scene).await.unwrap();
    let clearing = scene.upstream.clear(&thread, Some(&run), false);
    let stop = async {
        scene
            .sim
            .wait_for(|stats| stats.requests_by_operation.get("get_run") >= Some(&3))
            .await;
        scene.sim.handle.stop_foreign_run(thread.as_str());
    };
    let (cleared, ()) = tokio::join!(clearing, stop);
    cleared.unwrap();
    assert_eq!(
        scene
            .sim
            .handle
            .stats()
            .requests_by_operation
            .get("cancel_run"),
        None
    );

    scene.sim.handle.start_foreign_run(thread.as_str()).unwrap();
    let run = blocking(&mut scene).await.unwrap();
    scene
        .upstream
        .clear(&thread, Some(&run), true)
        .await
        .unwrap();
    assert_eq!(
        scene.sim.handle.stats().requests_by_operation["cancel_run"],
        1
    );
    scene.say("next").await;
}

#[tokio::test]
async fn unknown_blocker_is_awaited_briefly() {
    for flavour in ALL.into_iter().filter(|flavour| !flavour.is_chain()) {
        let scene = Scene::new(flavour).await;
        let requests = scene.sim.handle.stats().requests;
        let started = Instant::now();
        scene
            .upstream
            .clear(scene.thread.as_ref().unwrap(), None, true)
            .await
            .unwrap();
        assert!(
            (400..1500).contains(&started.elapsed().as_millis()),
            "{:?}",
            started.elapsed()
        );
        assert_eq!(scene.sim.handle.stats().requests, requests);
    }
}
