-- From schema 3 to schema 4.

ALTER TABLE job ADD COLUMN media TEXT CHECK (media IS NULL OR json_valid(media));              -- what its container says
ALTER TABLE job ADD COLUMN spooled INTEGER NOT NULL DEFAULT 0 CHECK (spooled IN (0, 1));       -- a copy was made on the local disk
ALTER TABLE job ADD COLUMN asked TEXT;                                                         -- the question that its transcript answers
ALTER TABLE job ADD COLUMN origin INTEGER REFERENCES job (id);                                 -- whose transcript was published again
ALTER TABLE job ADD COLUMN disposal TEXT
  CHECK (disposal IN ('archive', 'delete', 'archived', 'deleted', 'gone', 'changed'));         -- owed, or done, to the source

DELETE FROM transition WHERE verb = 'reuse';
INSERT INTO transition (verb, from_state, to_state, logged) VALUES
  ('reuse',     'ready',       'transcribed', 1),
  ('reject',    'seen',        'failed',      1),     -- it is no recording
  ('take',      'ready',       'ready',       0),     -- its content is known
  ('postpone',  'ready',       'ready',       0),     -- something that is not the file is absent
  ('wake',      'ready',       'ready',       1),     -- and is back
  ('rename',    'seen',        'seen',        1),
  ('rename',    'ready',       'ready',       1),
  ('rename',    'running',     'running',     1),
  ('recognise', 'transcribed', 'transcribed', 1),     -- the same content in another file
  ('recognise', 'done',        'done',        1),
  ('recognise', 'failed',      'failed',      1),
  ('recognise', 'cancelled',   'cancelled',   1),
  ('dispose',   'done',        'done',        1);

DROP TRIGGER job_keeps_its_identity;
CREATE TRIGGER job_keeps_its_identity BEFORE UPDATE OF id, inbox_id, path, seen_at ON job
WHEN OLD.id <> NEW.id OR OLD.inbox_id <> NEW.inbox_id OR (OLD.path <> NEW.path AND NEW.verb <> 'rename') OR OLD.seen_at <> NEW.seen_at
BEGIN
  SELECT RAISE(ABORT, 'illegal move: a job cannot become another file');
END;

-- What is held is not worked on, in whatever way; a job that is over is held no more.
DROP TRIGGER job_held_is_not_claimed;
CREATE TRIGGER job_held_is_not_claimed BEFORE UPDATE ON job
WHEN OLD.held = 1 AND NEW.verb IN ('claim', 'reuse')
BEGIN
  SELECT RAISE(ABORT, 'illegal move: it is held');
END;

DROP TRIGGER job_is_held_by_a_verb;
CREATE TRIGGER job_is_held_by_a_verb BEFORE UPDATE OF held ON job
WHEN NEW.held <> OLD.held AND NEW.verb <> CASE NEW.held WHEN 1 THEN 'hold' ELSE 'unhold' END
  AND NOT (NEW.verb IN ('cancel', 'reject') AND NEW.held = 0)
BEGIN
  SELECT RAISE(ABORT, 'illegal move: held and released by their verbs only');
END;

CREATE TRIGGER job_owes_what_it_said BEFORE UPDATE OF disposal ON job
WHEN (OLD.disposal IS NOT NEW.disposal OR NEW.verb = 'dispose') AND NOT (
  (NEW.verb = 'publish' AND coalesce(NEW.disposal, '') IN ('archive', 'delete'))
  OR (NEW.verb = 'dispose' AND coalesce(OLD.disposal, '') IN ('archive', 'delete')
      AND coalesce(NEW.disposal, '') IN ('archived', 'deleted', 'gone', 'changed')))
BEGIN
  SELECT RAISE(ABORT, 'illegal move: nothing of the kind is owed to its source');
END;

-- A rename keeps the former name, so that nobody goes on believing in it.
ALTER TABLE event ADD COLUMN path BLOB;
DROP TRIGGER job_update_writes_history;
CREATE TRIGGER job_update_writes_history AFTER UPDATE ON job
WHEN (SELECT logged FROM transition WHERE verb = NEW.verb AND from_state = OLD.state)
BEGIN
  INSERT INTO event (job_id, at, verb, from_state, to_state, attempt, note, path)
  VALUES (NEW.id, NEW.updated_at, NEW.verb, OLD.state, NEW.state, max(NEW.attempts, OLD.attempts), NEW.note,
          CASE WHEN OLD.path <> NEW.path THEN OLD.path END);
END;

-- How many jobs there are of each kind, kept by triggers: nobody has to count a million rows.
CREATE TABLE tally (
  inbox_id INTEGER NOT NULL,
  state    TEXT NOT NULL,
  held     INTEGER NOT NULL,
  quality  TEXT NOT NULL,                             -- '' is none
  jobs     INTEGER NOT NULL CHECK (jobs >= 0),
  PRIMARY KEY (inbox_id, state, held, quality)
) STRICT, WITHOUT ROWID;
INSERT INTO tally SELECT inbox_id, state, held, coalesce(quality, ''), count(*) FROM job GROUP BY 1, 2, 3, 4;

CREATE TRIGGER job_insert_is_counted AFTER INSERT ON job
BEGIN
  INSERT INTO tally VALUES (NEW.inbox_id, NEW.state, NEW.held, coalesce(NEW.quality, ''), 1) ON CONFLICT DO UPDATE SET jobs = jobs + 1;
END;
CREATE TRIGGER job_update_is_counted AFTER UPDATE OF state, held, quality ON job
WHEN OLD.state <> NEW.state OR OLD.held <> NEW.held OR OLD.quality IS NOT NEW.quality
BEGIN
  UPDATE tally SET jobs = jobs - 1
   WHERE inbox_id = OLD.inbox_id AND state = OLD.state AND held = OLD.held AND quality = coalesce(OLD.quality, '');
  INSERT INTO tally VALUES (NEW.inbox_id, NEW.state, NEW.held, coalesce(NEW.quality, ''), 1) ON CONFLICT DO UPDATE SET jobs = jobs + 1;
END;
CREATE TRIGGER job_delete_is_counted AFTER DELETE ON job
BEGIN
  UPDATE tally SET jobs = jobs - 1
   WHERE inbox_id = OLD.inbox_id AND state = OLD.state AND held = OLD.held AND quality = coalesce(OLD.quality, '');
END;

-- Stored transcripts, by content and question.
CREATE TABLE result (
  sha256     TEXT NOT NULL,
  asked      TEXT NOT NULL,
  transcript TEXT NOT NULL,                           -- name of the staged file
  revision   TEXT NOT NULL,                           -- of the model
  bytes      INTEGER NOT NULL CHECK (bytes >= 0),
  used_at    REAL NOT NULL,
  job_id     INTEGER NOT NULL REFERENCES job (id) ON DELETE CASCADE,
  PRIMARY KEY (sha256, asked)
) STRICT, WITHOUT ROWID;

-- What is owed to webhooks and hooks.
CREATE TABLE notice (
  id         INTEGER PRIMARY KEY,
  job_id     INTEGER NOT NULL REFERENCES job (id) ON DELETE CASCADE,
  event      TEXT NOT NULL CHECK (event IN ('done', 'failed')),
  target     TEXT NOT NULL,
  delivery   TEXT NOT NULL UNIQUE,                    -- by which the receiver tells the second from the first
  body       TEXT NOT NULL CHECK (json_valid(body)),
  attempts   INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
  not_before REAL NOT NULL,
  state      TEXT NOT NULL DEFAULT 'due' CHECK (state IN ('due', 'sent', 'given_up')),
  what       TEXT NOT NULL DEFAULT '',
  created_at REAL NOT NULL
) STRICT;
CREATE INDEX notice_due ON notice (not_before, id) WHERE state = 'due';

-- A path is in one of two indexes: a million files that are new fill one only.
DROP INDEX job_one_live_per_path;
CREATE UNIQUE INDEX job_one_live_per_path ON job (inbox_id, path) WHERE state = 'seen' OR state = 'ready' OR state = 'running';
DROP INDEX job_latest_per_path;
CREATE INDEX job_over_per_path ON job (inbox_id, path) WHERE state <> 'seen' AND state <> 'ready' AND state <> 'running';
CREATE INDEX job_by_inode ON job (inbox_id, inode);
CREATE INDEX job_by_content ON job (sha256) WHERE sha256 IS NOT NULL;

DROP INDEX job_by_state;
CREATE INDEX job_by_state ON job (inbox_id, state);
DROP INDEX job_by_quality;
CREATE INDEX job_by_quality ON job (inbox_id, quality, state) WHERE quality IS NOT NULL;
CREATE INDEX job_by_end ON job (ended_at, state) WHERE ended_at IS NOT NULL;
CREATE INDEX job_postponed ON job (failure_code) WHERE state = 'ready' AND failure_kind = 'waiting';
CREATE INDEX job_spooled ON job (inbox_id, priority, ready_at) WHERE state = 'ready' AND spooled = 1;
CREATE INDEX job_owed ON job (id) WHERE state = 'done' AND (disposal = 'archive' OR disposal = 'delete');

DROP INDEX reading_by_time;
CREATE INDEX reading_by_gpu ON reading (gpu);
