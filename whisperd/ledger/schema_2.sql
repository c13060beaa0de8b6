-- From schema 1 to schema 2.

ALTER TABLE job ADD COLUMN quality TEXT CHECK (quality IN ('good', 'second_pass', 'doubtful'));   -- of its transcript
CREATE INDEX job_by_quality ON job (quality, state) WHERE quality IS NOT NULL;

-- What made a window: the work goes on from it only for the same model, options, source and version. '' is unknown, and fits nothing.
ALTER TABLE checkpoint ADD COLUMN made_by TEXT NOT NULL DEFAULT '';

-- The front end's state after this window. Only the last window of a job needs one.
ALTER TABLE checkpoint ADD COLUMN front_end BLOB;

DROP TABLE vram_peak;   -- nothing has ever been written to it
CREATE TABLE vram_peak (
  gpu          TEXT NOT NULL,
  driver       TEXT NOT NULL,
  model        TEXT NOT NULL,
  compute_type TEXT NOT NULL,
  batch        INTEGER NOT NULL,                  -- windows
  beam         INTEGER NOT NULL,
  frames       INTEGER NOT NULL,                  -- mel frames of a window
  peak_mib     INTEGER NOT NULL CHECK (peak_mib >= 0),
  measured_at  REAL NOT NULL,
  PRIMARY KEY (gpu, driver, model, compute_type, batch, beam, frames)
) STRICT, WITHOUT ROWID;
