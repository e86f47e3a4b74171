-- What an erasure must find although it was made, or is still being made, while the request came.

-- When the conversation began that a rolled-over thread goes on with. NULL: with the thread itself. A request to delete
-- means the conversation, whatever thread it is on by the time that the request gets to it.
ALTER TABLE threads ADD COLUMN began_at timestamptz;

-- The replica that is making the upstream thread and will record its id here. While it lives nobody may take the thread for
-- never made. NULL: nobody makes it (any more).
ALTER TABLE remnants ADD COLUMN maker uuid;
