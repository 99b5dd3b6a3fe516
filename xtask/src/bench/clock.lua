-- Microseconds since 1970, read afresh; nginx' own clock is a millisecond coarse.
local ffi = require "ffi"
ffi.cdef "struct bench_time { long seconds; long nanos; }; int clock_gettime(int, struct bench_time *);"
local time = ffi.new "struct bench_time"
function micros()
  ffi.C.clock_gettime(0, time)
  return string.format("%d", tonumber(time.seconds) * 1000000 + math.floor(tonumber(time.nanos) / 1000))
end
