"""Routes in other formats: exports of archives, and dumps of other systems, read with full validation."""
