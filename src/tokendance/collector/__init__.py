"""Who computes what: owners, mirrors, correction policies and the placement of KV."""
