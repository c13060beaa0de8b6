-- The ledger, schema 1. The store itself refuses illegal states; history is written by triggers, not by good will.

CREATE TABLE inbox (
  id         INTEGER PRIMARY KEY,
  path       BLOB NOT NULL UNIQUE,
  outbox     BLOB NOT NULL,
  state      TEXT NOT NULL DEFAULT 'up' CHECK (state IN ('up', 'down')),
  what       TEXT NOT NULL DEFAULT '',
  active     INTEGER NOT NULL DEFAULT 1 CHECK (active IN (0, 1)),
  since      REAL NOT NULL,
  scanned_at REAL
) STRICT;

-- Each arrow of the state diagram is one row: verb, from, to. `logged` arrows leave an event.
CREATE TABLE transition (
  verb       TEXT NOT NULL,
  from_state TEXT NOT NULL,
  to_state   TEXT NOT NULL,
  logged     INTEGER NOT NULL CHECK (logged IN (0, 1)),
  PRIMARY KEY (verb, from_state)
) STRICT, WITHOUT ROWID;

INSERT INTO transition (verb, from_state, to_state, logged) VALUES
  ('see',        '',            'seen',        1),
  ('see',        'seen',        'seen',        0),
  ('settle',     'seen',        'ready',       1),
  ('claim',      'ready',       'running',     1),
  ('checkpoint', 'running',     'running',     0),
  ('progress',   'running',     'running',     0),
  ('release',    'running',     'ready',       1),
  ('interrupt',  'running',     'ready',       1),
  ('wait',       'running',     'ready',       1),
  ('finish',     'running',     'transcribed', 1),
  ('fail',       'running',     'failed',      1),
  ('publish',    'transcribed', 'done',        1),
  ('report',     'failed',      'failed',      1),
  ('reuse',      'ready',       'done',        1),
  ('retry',      'failed',      'ready',       1),
  ('retry',      'cancelled',   'ready',       1),
  ('cancel',     'ready',       'cancelled',   1),
  ('cancel',     'running',     'cancelled',   1),
  ('vanish',     'seen',        'gone',        1),
  ('vanish',     'ready',       'gone',        1),
  ('vanish',     'running',     'gone',        1);

CREATE TABLE job (
  id            INTEGER PRIMARY KEY AUTOINCREMENT,
  inbox_id      INTEGER NOT NULL REFERENCES inbox (id),
  path          BLOB NOT NULL CHECK (length(path) > 0),
  dev           INTEGER NOT NULL,
  inode         INTEGER NOT NULL,
  size          INTEGER NOT NULL CHECK (size >= 0),
  mtime_ns      INTEGER NOT NULL,
  ctime_ns      INTEGER NOT NULL,

  state         TEXT NOT NULL
                CHECK (state IN ('seen', 'ready', 'running', 'transcribed', 'done', 'failed', 'cancelled', 'gone')),
  verb          TEXT NOT NULL,                    -- the verb that brought the row to where it is
  note          TEXT NOT NULL DEFAULT '',         -- a sentence for the event of this verb
  updated_at    REAL NOT NULL,
  seen_at       REAL NOT NULL,
  ready_at      REAL,
  started_at    REAL,
  ended_at      REAL,

  options       TEXT CHECK (options IS NULL OR json_valid(options)),
  priority      INTEGER NOT NULL DEFAULT 1 CHECK (priority BETWEEN 0 AND 2),   -- 0 urgent, 1 normal, 2 low
  not_before    REAL NOT NULL DEFAULT 0,
  attempts      INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),              -- counted before work
  interruptions INTEGER NOT NULL DEFAULT 0 CHECK (interruptions >= 0),         -- deaths that were not the file's fault

  lease_child   TEXT,
  lease_epoch   TEXT,                             -- one life of the daemon
  lease_until   REAL,

  duration_s    REAL,
  position_s    REAL,
  sha256        TEXT,
  transcript    TEXT,                             -- name of the staged file
  language      TEXT,
  process_s     REAL,

  failure_kind  TEXT CHECK (failure_kind IN ('permanent', 'transient', 'waiting')),
  failure_code  TEXT,
  failure_what  TEXT,
  failure_hint  TEXT,
  failure_tail  TEXT NOT NULL DEFAULT '',         -- last lines of the child
  reported_at   REAL,                             -- the error file is in the outbox

  CHECK ((state = 'running') = (lease_child IS NOT NULL)),
  CHECK ((lease_child IS NULL) = (lease_epoch IS NULL) AND (lease_child IS NULL) = (lease_until IS NULL)),
  CHECK (state IN ('seen', 'gone') OR options IS NOT NULL),
  CHECK (state NOT IN ('transcribed', 'done') OR transcript IS NOT NULL),
  CHECK (state <> 'failed' OR (failure_kind IS NOT NULL AND failure_code IS NOT NULL AND failure_what IS NOT NULL)),
  CHECK (reported_at IS NULL OR state = 'failed'),
  CHECK ((state IN ('done', 'failed', 'cancelled', 'gone')) = (ended_at IS NOT NULL))
) STRICT;

CREATE UNIQUE INDEX job_one_live_per_path ON job (inbox_id, path) WHERE state IN ('seen', 'ready', 'running');
CREATE INDEX job_latest_per_path ON job (inbox_id, path, id DESC);
CREATE INDEX job_by_state ON job (state, priority, not_before, id);
CREATE INDEX job_unreported ON job (id) WHERE state = 'failed' AND reported_at IS NULL;

CREATE TABLE event (
  id         INTEGER PRIMARY KEY AUTOINCREMENT,
  job_id     INTEGER NOT NULL REFERENCES job (id) ON DELETE CASCADE,
  at         REAL NOT NULL,
  verb       TEXT NOT NULL,
  from_state TEXT NOT NULL,
  to_state   TEXT NOT NULL,
  attempt    INTEGER NOT NULL,
  note       TEXT NOT NULL
) STRICT;
CREATE INDEX event_of_job ON event (job_id, id);

CREATE TABLE checkpoint (
  job_id       INTEGER NOT NULL REFERENCES job (id) ON DELETE CASCADE,
  window_index INTEGER NOT NULL CHECK (window_index >= 0),
  end_s        REAL NOT NULL,
  body         TEXT NOT NULL CHECK (json_valid(body)),
  PRIMARY KEY (job_id, window_index)
) STRICT, WITHOUT ROWID;

-- Who owns which name in which outbox: two sources never share one.
CREATE TABLE name (
  outbox   BLOB NOT NULL,
  base     BLOB NOT NULL,
  inbox_id INTEGER NOT NULL REFERENCES inbox (id),
  path     BLOB NOT NULL,
  kind     TEXT NOT NULL CHECK (kind IN ('transcript', 'error', 'avoided')),
  PRIMARY KEY (outbox, base)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX name_of_source ON name (outbox, inbox_id, path, kind) WHERE kind <> 'avoided';

CREATE TABLE publication (
  outbox       BLOB NOT NULL,
  path         BLOB NOT NULL,
  job_id       INTEGER NOT NULL REFERENCES job (id) ON DELETE CASCADE,
  format       TEXT NOT NULL,
  sha256       TEXT NOT NULL,
  published_at REAL NOT NULL,
  PRIMARY KEY (outbox, path)
) STRICT, WITHOUT ROWID;
CREATE INDEX publication_of_job ON publication (job_id);

CREATE TABLE reading (
  id                  INTEGER PRIMARY KEY,
  at                  REAL NOT NULL,
  gpu                 TEXT NOT NULL,
  status              TEXT NOT NULL,
  what                TEXT NOT NULL,
  vram_total_mib      INTEGER,
  vram_used_mib       INTEGER,
  utilisation_percent INTEGER CHECK (utilisation_percent BETWEEN 0 AND 100),
  temperature_c       INTEGER
) STRICT;
CREATE INDEX reading_by_time ON reading (gpu, at);

CREATE TABLE plan (
  id      INTEGER PRIMARY KEY,
  at      REAL NOT NULL,
  workers INTEGER NOT NULL CHECK (workers >= 0),
  reason  TEXT NOT NULL CHECK (length(reason) > 0)
) STRICT;

CREATE TABLE vram_peak (
  gpu          TEXT NOT NULL,
  driver       TEXT NOT NULL,
  model        TEXT NOT NULL,
  compute_type TEXT NOT NULL,
  batch        INTEGER NOT NULL,
  peak_mib     INTEGER NOT NULL,
  measured_at  REAL NOT NULL,
  PRIMARY KEY (gpu, driver, model, compute_type, batch)
) STRICT, WITHOUT ROWID;

CREATE TABLE throughput (
  id      INTEGER PRIMARY KEY,
  at      REAL NOT NULL,
  job_id  INTEGER NOT NULL REFERENCES job (id) ON DELETE CASCADE,
  workers INTEGER NOT NULL,
  audio_s REAL NOT NULL,
  wall_s  REAL NOT NULL
) STRICT;
CREATE INDEX throughput_by_time ON throughput (at);

CREATE TABLE alert (
  id         INTEGER PRIMARY KEY,
  check_name TEXT NOT NULL,
  what       TEXT NOT NULL,
  raised_at  REAL NOT NULL,
  cleared_at REAL
) STRICT;
CREATE UNIQUE INDEX alert_one_open_per_check ON alert (check_name) WHERE cleared_at IS NULL;

-- What the daemon says of itself to the desk: one row a topic.
CREATE TABLE daemon (
  topic TEXT PRIMARY KEY,
  at    REAL NOT NULL,
  body  TEXT NOT NULL CHECK (json_valid(body))
) STRICT, WITHOUT ROWID;

CREATE TRIGGER job_begins_seen BEFORE INSERT ON job
WHEN NOT EXISTS (SELECT 1 FROM transition WHERE verb = NEW.verb AND from_state = '' AND to_state = NEW.state)
BEGIN
  SELECT RAISE(ABORT, 'illegal move: a job cannot begin in this state');
END;

CREATE TRIGGER job_moves_legally BEFORE UPDATE ON job
WHEN NOT EXISTS (SELECT 1 FROM transition WHERE verb = NEW.verb AND from_state = OLD.state AND to_state = NEW.state)
BEGIN
  SELECT RAISE(ABORT, 'illegal move: no such arrow between these states');
END;

CREATE TRIGGER job_keeps_its_identity BEFORE UPDATE OF id, inbox_id, path, seen_at ON job
WHEN OLD.id <> NEW.id OR OLD.inbox_id <> NEW.inbox_id OR OLD.path <> NEW.path OR OLD.seen_at <> NEW.seen_at
BEGIN
  SELECT RAISE(ABORT, 'illegal move: a job cannot become another file');
END;

CREATE TRIGGER job_done_is_published BEFORE UPDATE OF state ON job
WHEN NEW.state = 'done' AND OLD.state <> 'done' AND NOT EXISTS (SELECT 1 FROM publication WHERE job_id = NEW.id)
BEGIN
  SELECT RAISE(ABORT, 'illegal move: done without a published name');
END;

CREATE TRIGGER job_claim_counts BEFORE UPDATE ON job
WHEN NEW.verb = 'claim' AND OLD.state = 'ready' AND NEW.attempts <> OLD.attempts + 1
BEGIN
  SELECT RAISE(ABORT, 'illegal move: an attempt must be counted before its work');
END;

CREATE TRIGGER job_insert_writes_history AFTER INSERT ON job
BEGIN
  INSERT INTO event (job_id, at, verb, from_state, to_state, attempt, note)
  VALUES (NEW.id, NEW.updated_at, NEW.verb, '', NEW.state, NEW.attempts, NEW.note);
END;

CREATE TRIGGER job_update_writes_history AFTER UPDATE ON job
WHEN (SELECT logged FROM transition WHERE verb = NEW.verb AND from_state = OLD.state)
BEGIN
  INSERT INTO event (job_id, at, verb, from_state, to_state, attempt, note)
  VALUES (NEW.id, NEW.updated_at, NEW.verb, OLD.state, NEW.state, max(NEW.attempts, OLD.attempts), NEW.note);
END;

CREATE TRIGGER checkpoint_needs_a_running_job BEFORE INSERT ON checkpoint
WHEN NOT EXISTS (SELECT 1 FROM job WHERE id = NEW.job_id AND state = 'running')
BEGIN
  SELECT RAISE(ABORT, 'illegal move: a checkpoint needs a running job');
END;

CREATE TRIGGER event_is_for_ever BEFORE UPDATE ON event
BEGIN
  SELECT RAISE(ABORT, 'history cannot be rewritten');
END;
