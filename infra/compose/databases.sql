-- Run once, when the volume of Postgres is empty.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
