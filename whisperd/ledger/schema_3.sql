-- From schema 2 to schema 3.

-- The operator's word on a job: held back until released, and what it is known to need of a card's memory (it ran out with less).
ALTER TABLE job ADD COLUMN held INTEGER NOT NULL DEFAULT 0 CHECK (held IN (0, 1));
ALTER TABLE job ADD COLUMN needs_mib INTEGER CHECK (needs_mib >= 0);

INSERT INTO transition (verb, from_state, to_state, logged) VALUES
  ('hold',       'seen',    'seen',    1),
  ('hold',       'ready',   'ready',   1),
  ('hold',       'running', 'ready',   1),     -- interrupted: its windows stay
  ('unhold',     'seen',    'seen',    1),
  ('unhold',     'ready',   'ready',   1),
  ('prioritise', 'seen',    'seen',    1),
  ('prioritise', 'ready',   'ready',   1),
  ('prioritise', 'running', 'running', 1),
  ('cancel',     'seen',    'cancelled', 1);

CREATE TRIGGER job_held_is_not_claimed BEFORE UPDATE ON job
WHEN NEW.verb = 'claim' AND OLD.held = 1
BEGIN
  SELECT RAISE(ABORT, 'illegal move: it is held');
END;

CREATE TRIGGER job_is_held_by_a_verb BEFORE UPDATE OF held ON job
WHEN NEW.held <> OLD.held AND NEW.verb <> CASE NEW.held WHEN 1 THEN 'hold' ELSE 'unhold' END AND NOT (NEW.verb = 'cancel' AND NEW.held = 0)
BEGIN
  SELECT RAISE(ABORT, 'illegal move: held and released by their verbs only');
END;

-- What waits, as it is handed out: the oldest and the shortest of each inbox and class; apart from them those that ask for a place of their own.
CREATE INDEX job_waiting ON job (inbox_id, priority, ready_at)
  WHERE state = 'ready' AND held = 0 AND attempts = 0 AND needs_mib IS NULL;
CREATE INDEX job_waiting_short ON job (inbox_id, priority, size)
  WHERE state = 'ready' AND held = 0 AND attempts = 0 AND needs_mib IS NULL;
CREATE INDEX job_waiting_apart ON job (inbox_id, priority, ready_at)
  WHERE state = 'ready' AND held = 0 AND (attempts > 0 OR needs_mib IS NOT NULL);
CREATE INDEX job_waiting_by_model ON job (json_extract(options, '$.model'), priority, ready_at)
  WHERE state = 'ready' AND held = 0;

-- One minute of a card: a GPU by its UUID, or "cpu".
CREATE TABLE card_minute (
  gpu                      TEXT NOT NULL,
  at                       REAL NOT NULL,                -- its end
  samples                  INTEGER NOT NULL,
  memory_total_mib         INTEGER,
  memory_used_min_mib      INTEGER,
  memory_used_max_mib      INTEGER,
  own_max_mib              INTEGER,
  utilisation_mean_percent REAL,
  temperature_max_c        INTEGER,
  power_mean_w             REAL,
  throttled_s              REAL NOT NULL,
  workers                  REAL NOT NULL,
  batch                    INTEGER NOT NULL,
  audio_s                  REAL NOT NULL,
  PRIMARY KEY (gpu, at)
) STRICT, WITHOUT ROWID;
CREATE INDEX card_minute_by_time ON card_minute (at);

-- Every plan is stored with its cards and its reasons as values, so that it can be shown, and made again from the same history.
ALTER TABLE plan ADD COLUMN body TEXT CHECK (body IS NULL OR json_valid(body));

-- What the optimiser learned, so that a restart is warm.
CREATE TABLE learned (
  gpu          TEXT NOT NULL,
  driver       TEXT NOT NULL,
  model        TEXT NOT NULL,
  compute_type TEXT NOT NULL,
  batch        INTEGER NOT NULL,
  body         TEXT NOT NULL CHECK (json_valid(body)),
  updated_at   REAL NOT NULL,
  PRIMARY KEY (gpu, driver, model, compute_type, batch)
) STRICT, WITHOUT ROWID;
