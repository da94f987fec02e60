"""The tables of a new database, their version, and how an older one is brought to it."""

from __future__ import annotations

SCHEMA_VERSION = 3


MIGRATIONS: dict[int, str] = {  # version -> the SQL that makes it version + 1
    1: "ALTER TABLE data.rows ADD COLUMN template_args VARCHAR",
    2: "ALTER TABLE data.samples ADD COLUMN IF NOT EXISTS reasoning VARCHAR; ALTER TABLE data.samples ADD COLUMN IF NOT EXISTS outcome VARCHAR",
}


SCHEMA = """
CREATE SCHEMA data;
CREATE TABLE data.meta (key VARCHAR PRIMARY KEY, value VARCHAR);
CREATE TABLE data.rows (position BIGINT NOT NULL, row_id VARCHAR PRIMARY KEY, kind VARCHAR NOT NULL, style VARCHAR, prompt VARCHAR,
    chosen VARCHAR, rejected VARCHAR, completion VARCHAR, answer VARCHAR, label BOOLEAN, template_args VARCHAR);
CREATE TABLE data.occurrences (seq BIGINT NOT NULL, row_id VARCHAR NOT NULL, source VARCHAR NOT NULL, index BIGINT NOT NULL,
    role VARCHAR NOT NULL, columns VARCHAR);
CREATE TABLE data.source_columns (source VARCHAR, role VARCHAR, ordinal INTEGER, name VARCHAR, type VARCHAR);
CREATE TABLE data.source_state (source VARCHAR, role VARCHAR, fingerprint VARCHAR, n_records BIGINT, n_bad BIGINT, n_rows BIGINT,
    read_at TIMESTAMP);
CREATE TABLE data.measured (fingerprint VARCHAR PRIMARY KEY, measurement VARCHAR, reads VARCHAR, model VARCHAR,
    model_fingerprint VARCHAR, run VARCHAR, checkpoint VARCHAR, step BIGINT, engine VARCHAR, params VARCHAR, created TIMESTAMP);
CREATE TABLE data.samples (fingerprint VARCHAR, row_id VARCHAR, sample INTEGER, text VARCHAR, correct BOOLEAN, n_tokens INTEGER,
    logp DOUBLE, finished BOOLEAN, reasoning VARCHAR, outcome VARCHAR);
CREATE TABLE data.recipes (name VARCHAR PRIMARY KEY, text VARCHAR, scores_table VARCHAR, sources VARCHAR[], uses VARCHAR[],
    plain VARCHAR[], updated TIMESTAMP);
CREATE TABLE data.dataset_values (origin VARCHAR, name VARCHAR, run VARCHAR, checkpoint VARCHAR, step BIGINT, value DOUBLE,
    low DOUBLE, high DOUBLE, n BIGINT);
CREATE TABLE data.runs (id BIGINT PRIMARY KEY, recipe VARCHAR, command VARCHAR, version VARCHAR, started TIMESTAMP,
    finished TIMESTAMP, outcome VARCHAR, message VARCHAR, counts VARCHAR, host VARCHAR, pid BIGINT);
CREATE TABLE data.selections (name VARCHAR PRIMARY KEY, recipe VARCHAR, spec VARCHAR, counts VARCHAR, created TIMESTAMP);
CREATE TABLE data.decisions (selection VARCHAR, row_id VARCHAR, kept BOOLEAN, rank BIGINT, reason VARCHAR);
CREATE TABLE data.throughput (key VARCHAR, tokens BIGINT, seconds DOUBLE, noted TIMESTAMP);
"""
