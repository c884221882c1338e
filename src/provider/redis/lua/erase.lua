-- Removes the content and the deliveries of the event whose id is ARGV[4]. Its seq stays used and its id known. Answers with
-- how many events went.

allow_when_full()
local id = ARGV[4]
local seq = call('HGET', P .. 'ids', id)
local text = seq and call('HGET', P .. 'ev', seq)
if not text then return 0 end
local event = read_event(text)
remove_event(seq, event)
store_removed()
call('ZADD', P .. 'erased', int(event.created), seq)
call('HSET', P .. 'erased-ids', seq, id)
finish(true)
return 1
