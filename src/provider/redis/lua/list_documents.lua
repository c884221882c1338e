-- A page of a collection: ARGV[4] the collection, [5] where to begin as ZRANGEBYLEX has it, [6] how many keys to look at,
-- [7] the only key wanted, in place of both. Answers with key, revision and value of each that is live, then the last key
-- looked at where there may be more.

local collection, limit = ARGV[4], tonumber(ARGV[6])
local keys = ARGV[7] and { ARGV[7] } or call('ZRANGEBYLEX', P .. 'z:' .. collection, ARGV[5], '+', 'LIMIT', 0, limit)
local answer = {}
for _, key in ipairs(keys) do
  local value, revision = read_document(collection, key)
  if value then
    answer[#answer + 1] = key
    answer[#answer + 1] = int(revision)
    answer[#answer + 1] = value
  end
end
if #keys == limit then answer[#answer + 1] = keys[#keys] end
return answer
