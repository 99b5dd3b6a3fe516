//! Every refusal that a local backend can give, over HTTP and gRPC.
