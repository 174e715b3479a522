"""Everything that speaks Envoy: the ext_proc stream, the access log service, the members file and the bootstrap."""
