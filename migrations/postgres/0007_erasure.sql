-- What an erasure must find although it was made, or is still being made, while the request came.

-- When the conversation began that a rolled-over thread goes on with. NULL: with the thread itself. A request to delete
-- means the conversation, whatever thread it is on by the time that the request gets to it.
ALTER TABLE threads ADD COLUMN began_at timestamptz;

-- A process is making the upstream thread, and will record its id here. Until then nobody may take it for never made.
ALTER TABLE remnants ADD COLUMN underway boolean NOT NULL DEFAULT false;
