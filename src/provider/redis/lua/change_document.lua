-- Stores or removes a document if it stands as expected. ARGV[4] the collection, [5] the key, [6] '' for any, 'absent' or a
-- revision, [7] the time to live ('' for ever), [8] the value; without one it is removed. Answers with 1 and the new
-- revision, or whether it was there; or with 0 and the revision at which it stands instead, -1 where there is none.

local collection, key, expect = ARGV[4], ARGV[5], ARGV[6]
local _, stands = read_document(collection, key)
local holds = expect == '' or (expect == 'absent' and not stands) or (stands and int(stands) == expect)
if not holds then return { 0, int(stands or -1) } end
if ARGV[8] then
  ensure_log()
  local expires = (ARGV[7] ~= '') and now + tonumber(ARGV[7]) or 0
  return { 1, int(put_document(collection, key, ARGV[8], expires)) }
end
if stands then remove_document(collection, key) end
return { 1, stands and '1' or '0' }
