//! The simulator at its socket.

use serde_json::json;

use crate::support::wire::{Sim, id, names};

#[tokio::test]
async fn a_run_streams_in_the_documented_order() {
    let sim = Sim::instant().await;
    let thread = sim.thread().await;
    let body = json!({
        "assistant_id": "asst_1", "stream": true, "additional_messages": [{"role": "user", "content": "Hé 🙂"}],
    });
    let events = sim.events(&format!("/threads/{thread}/runs"), body).await;
    assert_eq!(
        names(&events),
        [
            "thread.run.created",
            "thread.run.queued",
            "thread.run.in_progress",
            "thread.run.step.created",
            "thread.run.step.in_progress",
            "thread.message.created",
            "thread.message.in_progress",
            "thread.message.delta",
            "thread.message.completed",
            "thread.run.step.completed",
            "thread.run.completed",
            "done",
        ]
    );
    assert_eq!(events.last().unwrap().data, "[DONE]");
    let reply = "You said: Hé 🙂. (This is turn 1 of this conversation.)";
    let deltas = events.iter().filter(|event| event.name == "thread.message.delta");
    let text: String = deltas
        .map(|event| event.json()["delta"]["content"][0]["text"]["value"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(text, reply);
    let history = sim.handle.thread_history(&thread);
    assert_eq!(
        history,
        [("user".to_owned(), "Hé 🙂".to_owned()), ("assistant".to_owned(), reply.to_owned())]
    );
}

#[tokio::test]
async fn a_response_streams_in_the_documented_order() {
    let sim = Sim::instant().await;
    let conversation = sim.conversation().await;
    let body = json!({"model": "m", "conversation": conversation, "input": "Hello", "stream": true});
    let events = sim.events("/responses", body).await;
    assert_eq!(
        names(&events),
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    for (n, event) in events.iter().enumerate() {
        assert_eq!(event.json()["sequence_number"], n);
        assert_eq!(event.json()["type"], event.name);
    }
    let last = events.last().unwrap().json();
    let reply = "You said: Hello. (This is turn 1 of this conversation.)";
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], reply);
    let next =
        sim.post("/responses", json!({"model": "m", "conversation": conversation, "input": "Again"})).await;
    assert_eq!(
        next["output"][0]["content"][0]["text"],
        "You said: Again. (This is turn 2 of this conversation.)"
    );
    assert_eq!(id(&sim.get(&format!("/responses/{}", id(&next))).await), id(&next));
}
