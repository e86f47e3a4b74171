#!/bin/sh
# A conversation by curl (7.82 or newer):  sh examples/chat.sh
# BASE is the gateway, TOKEN a key or token for it, CHAT_USER a user whom the last step erases.
set -eu
BASE=${BASE:-http://127.0.0.1:8080}
user=$BASE/v1/users/${CHAT_USER:-curl-example}

# --fail-with-body: an error's `detail` says how to mend the request.
call() {
  curl --silent --show-error --fail-with-body ${TOKEN:+--header "authorization: Bearer $TOKEN"} "$@"
}
step() { printf '\n\n== %s\n' "$*"; }

step "A message, and its reply when it is complete"
call --json '{"content": "Hello, I am Alice."}' "$user/messages"

step "A message, and its reply word by word"
call --no-buffer --json '{"content": "Tell me more.", "stream": true}' "$user/messages"

# The part in brackets is for the simulator of `threadkeeper dev`: a reply of 400 words. A model ignores it.
long='Tell me a long story. [[sim: tokens=400]]'

step "A long reply, for which we do not wait"
answer=$(call --header 'prefer: respond-async' --json "{\"content\": \"$long\"}" "$user/messages")
run=$(echo "$answer" | sed 's/.*"run":{"id":"\([^"]*\)".*/\1/')
echo "$answer"

step "Follow it for a second; that the connection ends then does not stop the run"
call --no-buffer --max-time 1 "$user/runs/$run/events" || true

step "The thread is busy now, and this message does not want to wait: 409"
call --json '{"content": "Are you there?", "multitask_strategy": "reject"}' "$user/messages" || true

step "This one waits in the queue"
call --header 'prefer: respond-async' --json '{"content": "And then?"}' "$user/messages"

step "Stop: the active run ends, and the text so far stays"
call --request POST "$user/thread/cancel"

step "Send it twice with one key: the model is asked once"
for attempt in first second; do
  call --header 'idempotency-key: example-1' --json '{"content": "Only once."}' "$user/messages"
  echo
done

step "The transcript"
call "$user/messages?order=asc"

step "Erase the user, here and upstream"
call --request DELETE "$user"
echo
