//! An upstream that fails too often is left alone.

use std::time::Duration;

use threadkeeper::config::UpstreamKind;
use threadkeeper::upstream::UpstreamError;

use super::scripted::{Play, Scripted, Step, json_answer, sse};
use super::{EXPECTED, RESPONSES_TURN, adapter, config, lines, thread, turn};
use crate::support::gateway::PATIENCE;

#[tokio::test]
async fn after_failures_in_a_row_no_call_is_made_until_one_is_tried_and_answered() {
    let good = || sse(vec![Step::Bytes(RESPONSES_TURN.into())]);
    let bad = || json_answer(503, &[], "");
    let server = Scripted::start(vec![
        bad(),
        json_answer(429, &[], ""),
        bad(),
        Play::HangUp,
        bad(),
        good(),
        bad(),
        good(),
    ])
    .await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    (settings.max_failures, settings.rest) = (2, Duration::from_millis(300));
    let upstream = adapter(&settings);
    let asked = || server.requests().len();
    let fails = async || turn(&*upstream, Some(&thread())).await.unwrap_err();

    // An answer between two failures counts, whatever it says.
    fails().await;
    assert!(matches!(fails().await, UpstreamError::RateLimited { .. }));
    fails().await;
    assert!(upstream.available().is_ok());
    fails().await;
    let rest = upstream.available().unwrap_err();
    let error = fails().await;
    assert!(matches!(error, UpstreamError::Resting { retry_after } if retry_after <= rest), "{error:?}");
    assert!(!error.is_ambiguous());
    assert_eq!(asked(), 4, "nothing was sent");

    // The probe fails, the next one does not.
    tokio::time::sleep(rest).await;
    assert!(upstream.available().is_ok());
    fails().await;
    tokio::time::sleep(upstream.available().unwrap_err()).await;
    assert_eq!(lines(&turn(&*upstream, Some(&thread())).await.unwrap()), EXPECTED);
    fails().await;
    assert!(upstream.available().is_ok());
    assert_eq!(lines(&turn(&*upstream, Some(&thread())).await.unwrap()), EXPECTED);
    assert_eq!(asked(), 8);
}

#[tokio::test]
async fn a_probe_that_is_given_up_lets_the_next_call_through() {
    let server = Scripted::start(vec![
        json_answer(500, &[], ""),
        Play::Silence,
        sse(vec![Step::Bytes(RESPONSES_TURN.into())]),
    ])
    .await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    (settings.max_failures, settings.rest) = (1, Duration::from_millis(50));
    let upstream = adapter(&settings);
    turn(&*upstream, Some(&thread())).await.unwrap_err();
    tokio::time::sleep(upstream.available().unwrap_err()).await;
    {
        let thread = thread();
        let probe = turn(&*upstream, Some(&thread));
        let mut probe = std::pin::pin!(probe);
        while server.requests().len() < 2 {
            tokio::select! {
                biased;
                _ = &mut probe => panic!("the server says nothing"),
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
        }
        assert!(upstream.available().is_err());
    }
    assert_eq!(lines(&turn(&*upstream, Some(&thread())).await.unwrap()), EXPECTED);
}

/// The call that tries whether it is back has no answer yet: that holds up others only for a while.
#[tokio::test]
async fn a_silent_probe_holds_up_the_next_one_only_for_a_while() {
    let good = sse(vec![Step::Bytes(RESPONSES_TURN.into())]);
    let server = Scripted::start(vec![json_answer(500, &[], ""), Play::Silence, good]).await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    (settings.max_failures, settings.rest) = (1, Duration::from_millis(50));
    let upstream = adapter(&settings);
    turn(&*upstream, Some(&thread())).await.unwrap_err();
    tokio::time::sleep(upstream.available().unwrap_err()).await;
    let thread = thread();
    let next = async {
        while server.requests().len() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        while let Err(wait) = upstream.available() {
            tokio::time::sleep(wait).await;
        }
        turn(&*upstream, Some(&thread)).await.unwrap()
    };
    tokio::select! {
        silent = turn(&*upstream, Some(&thread)) => panic!("the server said nothing: {silent:?}"),
        next = tokio::time::timeout(PATIENCE, next) => assert_eq!(lines(&next.expect("it is tried")), EXPECTED),
    }
    assert!(upstream.available().is_ok());
}

#[tokio::test]
async fn it_can_be_switched_off() {
    let server = Scripted::start((0..20).map(|_| json_answer(503, &[], "")).collect()).await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    settings.max_failures = 0;
    let upstream = adapter(&settings);
    for _ in 0..20 {
        turn(&*upstream, Some(&thread())).await.unwrap_err();
    }
    assert_eq!(server.requests().len(), 20);
}

#[tokio::test]
async fn a_call_that_the_server_does_not_have_says_nothing_against_the_server() {
    let bad = |status| json_answer(status, &[], "");
    let server = Scripted::start(vec![bad(503), bad(501), bad(503)]).await;
    let mut settings = config(UpstreamKind::Responses, &server.url);
    settings.max_failures = 2;
    let upstream = adapter(&settings);
    for status in [503, 501, 503] {
        let error = turn(&*upstream, Some(&thread())).await.unwrap_err();
        assert_eq!(matches!(error, UpstreamError::Refused { .. }), status == 501, "{error:?}");
    }
    assert!(upstream.available().is_ok());
}
